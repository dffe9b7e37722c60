"""Scripts for shells that complete the command line: verbs, flags, and values where they are known.

A script contains all verbs and flags, so that pressing the Tab key starts no Python. Where a value may be a file, the
shell completes names of files.
"""

import dataclasses
import textwrap
from collections.abc import Sequence

from mae_dat.config.flags import Flag
from mae_dat.config.recipes import recipe_names


@dataclasses.dataclass(frozen=True)
class CompletedVerb:
    """What a shell has to know about a verb of one word or two."""

    name: str
    summary: str
    flags: Sequence[Flag]

    @property
    def options(self) -> dict[str, Flag]:
        """The flags as they are typed, with `--no_NAME` for switches that are on by default."""
        options = {}
        for flag in self.flags:
            if not flag.positional:
                options[f"--{flag.name}"] = flag
                if flag.is_switch and flag.default is True:
                    options[f"--no_{flag.name}"] = flag
        return options

    @property
    def arguments(self) -> list[Flag]:
        """The positional arguments."""
        return [flag for flag in self.flags if flag.positional]


def completion_script(shell: str, verbs: Sequence[CompletedVerb], launcher: CompletedVerb) -> str:
    """Return the script for `shell`: bash, zsh or fish. `launcher` is the verb that another verb follows."""
    write = {"bash": _bash_script, "zsh": _zsh_script, "fish": _fish_script}[shell]
    header = f"# Completion of mae-dat for {shell}, printed by `mae-dat completion {shell}`."
    return f"{header}\n{write([*verbs, launcher], launcher.name)}"


def _known_values(flag: Flag) -> list[str]:
    """Return the values of a flag to choose from: its choices, or the names of recipes; empty if they are not known."""
    if flag.name.endswith("config") or flag.positional == "RECIPE":
        return recipe_names()
    # A colon separates words in shells.
    return [choice for choice in flag.choices if ":" not in choice]


def _first_words(verbs: Sequence[CompletedVerb]) -> dict[str, list[CompletedVerb]]:
    """Return the verbs by their first words; several for verbs of two words."""
    first_words: dict[str, list[CompletedVerb]] = {}
    for verb in verbs:
        first_words.setdefault(verb.name.split()[0], []).append(verb)
    return first_words


def _families(verbs: Sequence[CompletedVerb]) -> dict[str, list[CompletedVerb]]:
    """Return the verbs of two words by their first words."""
    return {first: kinds for first, kinds in _first_words(verbs).items() if kinds[0].name != first}


def _help(flag: Flag) -> str:
    """Return the first sentence of the help of a flag, short enough for a list."""
    sentence = flag.help.partition(". ")[0].removesuffix(".")
    return textwrap.shorten(sentence, 72, placeholder=" ...")


# ---- bash ----

_BASH = """
# Sets `flags` to the flags of the verb $1.
_mae_dat_flags() {
    case "$1" in
@FLAGS@
        *) flags="--help" ;;
    esac
}

# Sets `values` to the words that may follow $1, a verb or a verb and a flag, and `kind` to what is expected: file,
# number, many (values), nothing, or flags.
_mae_dat_values() {
    values="" kind=file
    case "$1" in
@VALUES@
    esac
}

_mae_dat() {
    local current="${COMP_WORDS[COMP_CWORD]}" words=() word verb="" flag="" given=0 i flags values kind
    for ((i = 1; i < COMP_CWORD; i++)); do  # bash splits --flag=value at the =
        [[ "${COMP_WORDS[i]}" == "=" ]] || words+=("${COMP_WORDS[i]}")
    done
    [[ "$current" == "=" ]] && current=""
    if [[ "${words[0]}" == "@LAUNCHER@" ]]; then
        for ((i = 1; i < ${#words[@]}; i++)); do
            [[ " @FIRST_WORDS@ " == *" ${words[i]} "* ]] && words=("${words[@]:i}") && break
        done
    fi
    case "${words[0]} ${words[1]}" in
        @TWO_WORDS@) verb="${words[0]} ${words[1]}" words=("${words[@]:2}") ;;
        *) verb="${words[0]}" words=("${words[@]:1}") ;;
    esac
    for word in "${words[@]}"; do
        if [[ "$word" == --* ]]; then flag="--${word:2}" given=0; else given=$((given + 1)); fi
    done
    _mae_dat_flags "$verb"
    _mae_dat_values "$verb${flag:+ $flag}"
    if [[ -z "$flag" || $kind == nothing || ( $kind != many && $given -gt 0 ) ]]; then
        _mae_dat_values "$verb"
    fi
    [[ "$current" == -* || $kind == flags ]] && values="$flags"
    [[ $kind == number ]] && compopt +o default 2> /dev/null
    COMPREPLY=($(compgen -W "$values" -- "$current"))
}

complete -o default -F _mae_dat mae-dat
"""


def _bash_script(verbs: Sequence[CompletedVerb], launcher: str) -> str:
    first_words = " ".join(_first_words(verbs))
    flags = {"": "--help --version"} | {verb.name: " ".join([*verb.options, "--help"]) for verb in verbs}
    values = [f'"" | "{launcher}") values="{first_words}" ;;']
    for first, kinds in _families(verbs).items():
        values.append(f'"{first}") values="{" ".join(verb.name.split()[1] for verb in kinds)}" ;;')
    for verb in verbs:
        values += _bash_values(verb)
    script = _BASH.replace("@FLAGS@", _indent([f'"{name}") flags="{words}" ;;' for name, words in flags.items()]))
    script = script.replace("@VALUES@", _indent(values))
    script = script.replace("@LAUNCHER@", launcher).replace("@FIRST_WORDS@", first_words)
    return script.replace("@TWO_WORDS@", " | ".join(f'"{verb.name}"' for verb in verbs if " " in verb.name))


def _indent(lines: Sequence[str]) -> str:
    return textwrap.indent("\n".join(lines), 8 * " ")


def _bash_values(verb: CompletedVerb) -> list[str]:
    """Return the lines of `_mae_dat_values` for a verb: one for each known list of values, one for each kind."""
    values = " ".join(value for flag in verb.arguments for value in _known_values(flag))
    lines = [f'"{verb.name}") {f"""values="{values}" """ if values else ""}kind={_kind_of_arguments(verb)} ;;']
    by_kind: dict[str, list[str]] = {}
    for option, flag in verb.options.items():
        if known := _known_values(flag):
            lines.append(f'"{verb.name} {option}") values="{" ".join(known)}" ;;')
        else:
            by_kind.setdefault(_kind(flag), []).append(f'"{verb.name} {option}"')
    return lines + [f"{' | '.join(patterns)}) kind={kind} ;;" for kind, patterns in by_kind.items() if kind != "file"]


def _kind_of_arguments(verb: CompletedVerb) -> str:
    return "file" if verb.arguments else "flags"


def _kind(flag: Flag) -> str:
    """Return what a flag takes: nothing, many (values), a number or a file."""
    if flag.is_switch:
        return "nothing"
    if flag.count != 1:
        return "many"
    return "number" if flag.kind in (int, float) else "file"


# ---- zsh ----

_ZSH = """
_mae_dat() {
    local verb i
    local -a first_words=(
@FIRST_WORDS@
    )
    shift words; (( CURRENT-- ))
    if [[ $words[1] == @LAUNCHER@ ]]; then
        for (( i = 2; i < CURRENT; i++ )); do
            if (( $+first_words[(r)$words[i]:*] )) && [[ -n $first_words[(r)$words[i]:*] ]]; then
                shift $(( i - 1 )) words; (( CURRENT -= i - 1 )); break
            fi
        done
    fi
    if (( CURRENT == 1 )); then
        _describe -t verbs verb first_words
        _arguments '--help[Print the list of verbs]' '--version[Print the version]'
        return
    fi
    verb=$words[1]
    case $verb in
@FAMILIES@
    esac
    case $verb in
@VERBS@
    esac
}

if [[ $funcstack[1] == _mae_dat ]]; then
    _mae_dat "$@"
else
    compdef _mae_dat mae-dat
fi
"""


def _zsh_script(verbs: Sequence[CompletedVerb], launcher: str) -> str:
    first_words = [_zsh_item(first, _summary(first, kinds)) for first, kinds in _first_words(verbs).items()]
    families = []
    for first, kinds in _families(verbs).items():
        items = " ".join(_zsh_item(verb.name.split()[1], verb.summary) for verb in kinds)
        shift = "verb+=' '$words[2]; shift words; (( CURRENT-- ))"
        families.append(f"{first})")
        families.append(
            f"    if (( CURRENT == 2 )); then local -a kinds=({items}); _describe -t kinds kind kinds; return; fi"
        )
        families.append(f"    {shift} ;;")
    specs = []
    for verb in verbs:
        arguments = ["'--help[Print the help]'", *(_zsh_spec(option, flag) for option, flag in verb.options.items())]
        if verb.name == launcher:
            arguments += ["'1:verb or script:{ _describe -t verbs verb first_words; _files -g \"*.py\" }'"]
        arguments += [
            f"'{'*' if flag.count is None else ''}:{flag.positional}:{_zsh_action(flag)}'" for flag in verb.arguments
        ]
        specs += [f"'{verb.name}') _arguments \\", *(f"    {argument} \\" for argument in arguments), "    ;;"]
    script = _ZSH.replace("@FIRST_WORDS@", _indent(first_words)).replace("@LAUNCHER@", launcher)
    return script.replace("@FAMILIES@", _indent(families)).replace("@VERBS@", _indent(specs))


def _summary(first: str, kinds: Sequence[CompletedVerb]) -> str:
    """Return the summary of a verb, or the kinds of a first word."""
    return kinds[0].summary if kinds[0].name == first else ", ".join(verb.name.split()[1] for verb in kinds)


def _zsh_item(word: str, summary: str) -> str:
    return _quote(f"{word}:{summary}")


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_spec(option: str, flag: Flag) -> str:
    """Return the specification of a flag for zsh's `_arguments`."""
    text = "".join(f"\\{letter}" if letter in "[]:\\" else letter for letter in _help(flag))
    if flag.is_switch:
        return _quote(f"{option}[{text}]")
    repeated = "" if flag.count == 1 else "*"
    return _quote(f"{repeated}{option}=[{text}]:{'' if flag.bare is None else ':'}{flag.name}:{_zsh_action(flag)}")


def _zsh_action(flag: Flag) -> str:
    if values := _known_values(flag):
        return f"({' '.join(values)})"
    return " " if _kind(flag) == "number" else "_files"


# ---- fish ----

_FISH = """
# Prints the verb on the command line, of one word or two, after `@LAUNCHER@` the verb that follows.
function __mae_dat_verb
    set -l words (commandline -opc)[2..]
    if test "$words[1]" = @LAUNCHER@
        for i in (seq 2 (count $words))
            if contains -- $words[$i] @FIRST_WORDS@
                set words $words[$i..]
                break
            end
        end
    end
    if contains -- "$words[1] $words[2]" @TWO_WORDS@
        echo "$words[1] $words[2]"
    else
        echo "$words[1]"
    end
end

function __mae_dat_is
    test (__mae_dat_verb) = "$argv[1]"
end

complete -c mae-dat -f
complete -c mae-dat -n "__mae_dat_is ''" -l help -d 'Print the list of verbs'
complete -c mae-dat -n "__mae_dat_is ''" -l version -d 'Print the version'
@LINES@
"""


def _fish_script(verbs: Sequence[CompletedVerb], launcher: str) -> str:
    lines = []
    for first, kinds in _first_words(verbs).items():
        lines += [_fish_line(before, f"-a {first}", _summary(first, kinds)) for before in ("", launcher)]
    for first, kinds in _families(verbs).items():
        lines += [_fish_line(first, f"-a {verb.name.split()[1]}", verb.summary) for verb in kinds]
    for verb in verbs:
        lines += [
            _fish_line(verb.name, f"-l {option[2:]}{_fish_value(flag)}", _help(flag))
            for option, flag in verb.options.items()
        ]
        lines.append(_fish_line(verb.name, "-l help", "Print the help"))
        lines += [
            _fish_line(verb.name, _fish_value(flag).replace("-x", "").replace("-r", ""), "") for flag in verb.arguments
        ]
    script = _FISH.replace("@LAUNCHER@", launcher).replace("@FIRST_WORDS@", " ".join(_first_words(verbs)))
    script = script.replace("@TWO_WORDS@", " ".join(f'"{verb.name}"' for verb in verbs if " " in verb.name))
    return script.replace("@LINES@", "\n".join(lines))


def _fish_line(verb: str, what: str, text: str) -> str:
    description = f" -d {_quote(text)}" if text else ""
    return f"""complete -c mae-dat -n "__mae_dat_is '{verb}'" {what}{description}"""


def _fish_value(flag: Flag) -> str:
    """Return what fish has to know about the value of a flag."""
    if flag.is_switch:
        return ""
    if values := _known_values(flag):
        return f" -x -a '{' '.join(values)}'"
    return " -x" if _kind(flag) == "number" else " -r -F"
