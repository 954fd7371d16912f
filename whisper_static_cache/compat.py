"""Tell whether releases of transformers have what this package counts on, from their sources.

python -m whisper_static_cache.compat                      # the installed release
python -m whisper_static_cache.compat 5.17.0 latest        # releases, downloaded as wheels and read, not installed
python -m whisper_static_cache.compat some.whl folder/     # a wheel, or a folder that holds transformers' sources

Sources are parsed with `ast` and compared with `compat_symbols.SYMBOLS`; neither torch nor transformers is imported.
"""

import argparse
import ast
import importlib.util
import posixpath
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .compat_symbols import NEWEST, RANGE, RELEASES, SYMBOLS, Found, Parameter, difference, in_range


class InputError(Exception):
    """What was asked of the command cannot be read; the message is one sentence."""


class Sources:
    """The sources of one release, in a wheel or a folder, read without importing anything.

    Args:
        path: a wheel, or a folder with `transformers/` or `src/transformers/` in it, or that folder itself.

    Raises:
        InputError: there is no transformers.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"{path} does not exist: give a version, a wheel, or a folder.")
        if self.path.is_dir():
            inside = (self.path / "transformers", self.path / "src" / "transformers", self.path)
            root = next((folder for folder in inside if (folder / "__init__.py").is_file()), None)
            self._root = root and root.parent
            self._zip = None
            known = root is not None and root.name == "transformers"
        else:
            if not zipfile.is_zipfile(self.path):
                raise InputError(f"{path} is no wheel: give a version, a wheel, or a folder.")
            self._zip = zipfile.ZipFile(self.path)
            known = "transformers/__init__.py" in self._zip.namelist()
        match = known and re.search(r'^__version__ = "([^"]+)"', self._read("transformers/__init__.py"), re.MULTILINE)
        if not match:
            raise InputError(f"{path} holds no transformers: give a version, a wheel, or a folder.")
        self.release = match.group(1)
        self._trees = {}

    def _read(self, name):
        if self._zip is not None:
            return self._zip.read(name).decode() if name in self._zip.namelist() else None
        file = self._root / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def _tree(self, module):
        """`(ast of the module, its package)`, or None; `module` without the leading `transformers.`."""
        if module not in self._trees:
            stem = posixpath.join("transformers", *module.split("."))
            self._trees[module] = None
            for name, package in (
                (f"{stem}.py", module.rpartition(".")[0]),
                (f"{stem}/__init__.py", module),
            ):
                text = self._read(name)
                if text is not None:
                    self._trees[module] = ast.parse(text), package
                    break
        return self._trees[module]

    def find(self, symbol):
        """`Found` for a row of `SYMBOLS`, or None."""
        first, *rest = symbol.name.split(".")
        place = self._definition(symbol.module, first)
        if place is None:
            return None
        module, node = place
        if rest:
            node = next((found for _, cls in self._mro(module, node) for found in _named(cls.body, rest[0])), None)
        if node is None:
            return None
        if isinstance(node, ast.ClassDef):
            return Found(None, frozenset(name for _, cls in self._mro(module, node) for name in _set_by(cls)))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return Found(_parameters(node.args), frozenset(_set_by(node)), frozenset(_asked_of_self(node)))
        return Found(None, frozenset())

    def instance_attributes(self, module, name):
        """Names that the class `name` sets on `self`, those of its bases included."""
        place = self._definition(module, name)
        return {
            node.attr
            for _, cls in (self._mro(*place) if place else ())
            for node in ast.walk(cls)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }

    def _definition(self, module, name):
        """`(module, node)` where `name` is defined, through any `from x import name`; None if nowhere in here."""
        tree = self._tree(module)
        if tree is None:
            return None
        body, package = tree
        for node in _named(_flat(body.body), name):
            if not isinstance(node, ast.ImportFrom):
                return module, node
            alias = next(a for a in node.names if (a.asname or a.name) == name)
            if node.level:
                parts = package.split(".") if package else []
                parts = parts[: len(parts) - node.level + 1] + (node.module.split(".") if node.module else [])
            elif node.module.split(".")[0] == "transformers":
                parts = node.module.split(".")[1:]
            else:
                continue
            found = self._definition(".".join(parts), alias.name)
            if found:
                return found
        return None

    def _mro(self, module, cls):
        """The class and all that it inherits from in transformers, depth first: near enough to look a name up."""
        yield module, cls
        for base in cls.bases:
            place = isinstance(base, ast.Name) and self._definition(module, base.id)
            if place and isinstance(place[1], ast.ClassDef):
                yield from self._mro(*place)


def _flat(body):
    """Statements of a module, those below `if` and `try` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
                yield from _flat(getattr(node, part, ()))


def _named(body, name):
    """The statements that give `name` a meaning."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [getattr(node.target, "id", None)]
        else:
            names = [getattr(node, "name", None)]
        if name in names:
            yield node


def _set_by(node):
    """Names that a class or a function sets: in the class's body, or as an attribute of anything."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            yield inner.attr
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, ast.AnnAssign):
            yield getattr(inner.target, "id", None)
        elif isinstance(inner, ast.Assign):
            yield from (target.id for target in inner.targets if isinstance(target, ast.Name))
        else:
            yield getattr(inner, "name", None)


def _asked_of_self(function):
    """Names of `self` that a method reads, and `__call__` where it calls it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "self":
            yield "__call__"


def _parameters(arguments):
    positional = [*arguments.posonlyargs, *arguments.args]
    needed = len(positional) - len(arguments.defaults)
    found = [Parameter(argument.arg, index >= needed) for index, argument in enumerate(positional)]
    if arguments.vararg:
        found.append(Parameter("*" + arguments.vararg.arg))
    found += [Parameter(a.arg, d is not None) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    if arguments.kwarg:
        found.append(Parameter("**" + arguments.kwarg.arg))
    return tuple(found)


# --- the command ----------------------------------------------------------------------------------------------------


def problems(sources):
    """`[(Symbol, difference)]` of a release's `Sources`, in the order of `SYMBOLS`."""
    found = []
    for symbol in SYMBOLS:
        if symbol.applies_to(sources.release):
            what = difference(symbol, sources.find(symbol))
            if what is not None:
                found.append((symbol, what))
    return found


def download(version, folder):
    """Path of the wheel of a release, fetched by pip; "latest" is the newest, pre-releases included.

    Raises:
        InputError: there is no such release, or the package index does not answer.
    """
    wanted = ["--pre", "transformers"] if version == "latest" else [f"transformers=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--dest", folder, *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(Path(folder).glob("transformers-*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = done.stdout + done.stderr
    if "from versions: none" in said or "No module named pip" in said or "connection" in said.lower():
        reason = "pip cannot reach the package index, check the network or give a wheel"
    else:
        last = (said.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("ERROR: ")
        reason = f"pip finds no wheel of it, give a version that has been released ({last})"
    raise InputError(f"transformers {version} cannot be downloaded: {reason}.")


def _open(argument, folder):
    """`Sources` of a version, a wheel, a folder, or, for None, of the installed transformers."""
    if argument is None:
        spec = importlib.util.find_spec("transformers")
        if spec is None or not spec.origin:
            raise InputError("transformers is not installed: give a version, a wheel, or a folder.")
        return Sources(Path(spec.origin).parent)
    if argument == "latest" or re.fullmatch(r"\d+(\.\d+)*((a|b|rc|\.dev|\.post)\d+)?", argument):
        return Sources(download(argument, folder))
    return Sources(argument)


def report(sources):
    """Lines of text on one release, and whether it is supported."""
    found = problems(sources)
    supported = in_range(sources.release) and all(symbol.otherwise for symbol, _ in found)
    if not in_range(sources.release):
        known = f", outside of the range {RANGE[0]} up to {RANGE[1]}"
    elif sources.release not in RELEASES:
        known = f", not in the test matrix (newest there: {NEWEST})"
    else:
        known = ""
    lines = [f"{sources.release}: {'supported' if supported else 'not supported'}{known}"]
    for symbol, what in found:
        effect = f"; {symbol.otherwise}" if symbol.otherwise else ""
        lines.append(f"  {symbol.full_name} {what}{effect}; see {symbol.file}")
    return lines, supported


def main(arguments=None):
    """The command; returns 0 if every release is supported, 1 if one is not, 2 if one cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m whisper_static_cache.compat",
        description="Tell whether releases of transformers have what this package counts on, from their sources.",
    )
    parser.add_argument(
        "releases",
        nargs="*",
        metavar="version",
        help='a version, "latest" (pre-releases too), a wheel, or a folder; by default the installed release',
    )
    code = 0
    for argument in parser.parse_args(arguments).releases or [None]:
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines, supported = report(_open(argument, folder))
            except InputError as error:
                print(error, file=sys.stderr)
                return 2
        print("\n".join(lines), flush=True)
        code = code if supported else 1
    return code


if __name__ == "__main__":
    sys.exit(main())
