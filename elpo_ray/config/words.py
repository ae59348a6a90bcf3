"""The words of a command line before Hydra reads them: what it would misread, or answer with its
usage, is refused here with what to write instead.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_origin

from elpo_ray.config import CONF_DIR, Config
from elpo_ray.config.files import is_file
from elpo_ray.config.meant import example, kind_of, meant, said

SWITCHES = frozenset(
    {
        "-h", "--help", "--hydra-help", "-m", "--multirun", "-r", "--run", "--resolve",
        "-i", "--info", "-sc", "--shell-completion",
    }
)  # fmt: skip
"""Hydra's own words that stand alone."""
WITH_VALUE = frozenset({"-c", "--cfg", "-p", "--package", "-cd", "--config-dir"})
"""Those after which a value stands."""
PARTS = {
    "-c": ("job", "hydra", "all"),
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
"""The values of those that know theirs."""
FILES = frozenset({"config", "config_file", "config_name", "cfg_file", "file", "cn", "yaml"})
"""Options by which other programs name a configuration file."""
EXPERIMENT = "experiment"


def check_named(words: Sequence[str]) -> None:
    """Raise ValueError for an empty command line: it names nothing to train."""
    if not words:
        names = ", ".join(_options([EXPERIMENT])[EXPERIMENT])
        raise ValueError(
            "no run is named; name a run's file, as in agent.yaml (elpo new FOLDER writes one), or "
            f"an experiment, as in +experiment=quickstart; experiments: {names}"
        )


def check_words(words: Sequence[str], schema: type, groups: Sequence[str]) -> None:
    """Raise ValueError, in one line with the remedy, for a word that is neither `key=value` nor one
    of Hydra's own. `groups` are the folders of `CONF_DIR` whose options can be chosen."""
    options = _options(groups)
    is_value = False
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) else ""
        if is_value:
            is_value = False
        elif word.startswith("-"):
            name, equals, value = word.partition("=")
            if name not in SWITCHES | WITH_VALUE:
                raise ValueError(_dashed(word, following, schema, options))
            is_value = name in WITH_VALUE and not equals
            known, given = PARTS.get(name), following if is_value else value
            if (is_value and not given) or (known and (given or is_value) and given not in known):
                some = ", ".join(known or ["a value"])
                raise ValueError(f"{name} {given}: no such value; write {name} and one of {some}")
        elif word.startswith("~"):
            key = word.lstrip("~").partition("=")[0]
            raise ValueError(f"{word}: keys are not deleted; write {key}=null or {key}=VALUE")
        elif "=" not in word and not is_file(word):
            raise ValueError(_bare(word, words[place + 1 : place + 3], schema, options))
        else:
            _check_choice(word, words, schema, options)


def switches_first(words: Sequence[str]) -> list[str]:
    """The words as Hydra can read them: its own before all `key=value`."""
    own, keys = list[str](), list[str]()
    for before, word in zip(["", *words], words, strict=False):
        (own if word.startswith("-") or before in WITH_VALUE else keys).append(word)
    return [*own, *keys]


def _options(groups: Sequence[str]) -> Mapping[str, Sequence[str]]:
    return {
        group: sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml")) for group in groups
    }


def _dashed(word: str, following: str, schema: type, options: Mapping[str, Sequence[str]]) -> str:
    """The line for an option with dashes, as other programs have them."""
    name, equals, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if not equals and "=" not in following and not following.startswith("-"):
        value = following
    shown = f"{name} {value}" if value and not equals else word
    value = value or "VALUE"
    if key == EXPERIMENT and EXPERIMENT in options:
        remedy = f"an experiment is added; write +experiment={value}"
    elif key in FILES:
        where = value if value != "VALUE" else "FILE.yaml"
        remedy = f"a run's file stands alone; write {where} without {name}"
    elif key in options:
        remedy = f"write {key}={value}"
    elif (instead := said(key)) is not None:
        remedy = instead
    elif found := meant(key, schema):
        written = " or ".join(_written(each, value, schema) for each in found)
        remedy = f"keys have no dashes; write {written}"
    else:
        remedy = f"keys have no dashes, as in {example(schema)}; --help lists them"
    return f"{shown}: no such option; {remedy}"


def _written(key: str, value: str, schema: type) -> str:
    """`key=value` as a shell takes it: a list in brackets and quotes, a switch with its value."""
    kind = kind_of(key, schema)
    if get_origin(kind) is list and not value.startswith("["):
        return shlex.quote(f"{key}=[{value}]")
    return f"{key}={'true' if kind is bool and value == 'VALUE' else value}"


def _bare(
    word: str, following: Sequence[str], schema: type, options: Mapping[str, Sequence[str]]
) -> str:
    """The line for a word without an equals sign, before the words `following`."""
    rest = "".join(following)
    if rest.startswith("="):
        value = rest.lstrip("=") if following[0] == "=" else following[0].lstrip("=")
        return f"{word} = {value}: not of the form key=value; write {word}={value} without spaces"
    for group, names in options.items():
        if word in names:
            sign = "+" if group == EXPERIMENT else ""
            return f"{word}: not of the form key=value; write {sign}{group}={word}"
    if Path(word).is_file():
        return f"{word}: a run's file has the suffix .yaml; rename it"
    if kind_of("model", schema) is str and ("/" in word or Path(word).is_dir()):
        return f"{word}: not of the form key=value; write model={word}"
    return (
        f"{word}: not of the form key=value; write for example {example(schema)}, or name a run's "
        "file that ends in .yaml"
    )


def _check_choice(
    word: str, words: Sequence[str], schema: type, options: Mapping[str, Sequence[str]]
) -> None:
    """Raise ValueError for a group that is chosen in a way that Hydra takes for something else."""
    key, _, value = word.partition("=")
    if key == EXPERIMENT and key in options:
        names = options[key]
        one = f"+experiment={value}" if value in names else f"+experiment=NAME ({', '.join(names)})"
        raise ValueError(f"{word}: an experiment is added, not replaced; write {one}")
    group = key.removeprefix("+")
    if key.startswith("+") and group in options and group != EXPERIMENT:
        raise ValueError(f"{word}: there is one already; write {group}={value} without the +")
    known = value in options.get("algorithm", ()) and f"algorithm={value}" not in words
    if schema is Config and key == "algorithm.name" and known:
        raise ValueError(f"{word}: this names the run only; write algorithm={value} to choose it")
