"""A library's version is that of the library, however often its package was made."""

import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest

from ltx_engines import libraries


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("10.14.1.48.post1", "10.14.1.48"),
        ("10.14.1.48.post12", "10.14.1.48"),
        ("10.14.1.48", "10.14.1.48"),
        ("11.0.0.dev3", "11.0.0.dev3"),
    ],
)
def test_what_a_package_adds_is_dropped(version: str, wanted: str) -> None:
    assert libraries.released(version) == wanted


def test_it_is_found_under_the_name_that_it_was_installed_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages = {"tensorrt-cu13": "10.14.1.48.post1"}

    def installed(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    (module := ModuleType("tensorrt")).__version__ = "10.13.0.post2"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(libraries, "find_spec", lambda name: name == "tensorrt" or None)
    monkeypatch.setattr(libraries, "installed", installed)
    assert libraries.version("tensorrt") == "10.14.1.48"
    packages.clear()
    assert libraries.version("tensorrt") == "10.13.0", "unpacked by hand"
    assert libraries.version("tensorrt-rtx") is None
