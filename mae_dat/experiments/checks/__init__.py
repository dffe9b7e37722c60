"""The checks of `mae-dat doctor`. Importing them needs neither torch nor any other package that may be broken."""
