"""What a training minimizes: from a batch to a loss and its named parts."""
