"The compiled scan is only ever loaded from bytes that this user's own process has written."

import ctypes
import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_nb.model import ssm

SHARED = ("g++", "-shared", "-fPIC", "-x", "c++", "-", "-o")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")


@pytest.fixture(scope="module")
def harmless(tmp_path_factory) -> bytes:
    "A library that stands for the kernel, and compiles at once; its end is read when it is loaded."
    path = tmp_path_factory.mktemp("library") / "scan.so"
    source = f'extern "C" int scan(int) {{ return 7; }} int data[] = {{{", ".join(map(str, range(1, 9000)))}}};'
    subprocess.run([*SHARED, path], input=source.encode(), check=True)
    return path.read_bytes()


@pytest.fixture
def planted(tmp_path) -> tuple[bytes, Path]:
    "A library that leaves a mark when it is loaded, and the mark."
    mark, path = tmp_path / "mark", tmp_path / "planted.so"
    write = f'__attribute__((constructor)) void f() {{ fopen("{mark}", "w"); }}'
    source = f'#include <cstdio>\nextern "C" int scan(int) {{ return 9; }}\n{write}'
    subprocess.run([*SHARED, path], input=source.encode(), check=True)
    return path.read_bytes(), mark


@pytest.fixture
def cache(tmp_path, monkeypatch, harmless):
    "A cache folder of its own, and a compiler that is quick."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ssm, "_compile", lambda compiler: harmless)
    assert fresh() == 7
    return tmp_path / "cache" / "hybrid_nb"


def fresh() -> int:
    "What the kernel answers that a new process would load."
    ssm._native_scan.cache_clear()
    scan = ssm._native_scan()
    scan.argtypes = [ctypes.c_int]
    return scan(0)


@pytest.fixture(autouse=True)
def forget():
    yield
    ssm._native_scan.cache_clear()


def files(cache: Path) -> tuple[Path, Path]:
    (library,) = cache.glob("scan-*.so")
    return library, Path(f"{library}.sha256")


def test_what_is_kept_is_used(cache, monkeypatch, capsys):
    assert sorted(p.name for p in cache.iterdir()) == sorted(p.name for p in files(cache)) and cache.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(ssm, "_compile", lambda compiler: pytest.fail("compiled again"))
    assert fresh() == 7 and capsys.readouterr().err == ""


def test_damage_is_compiled_anew(cache, harmless, capsys):
    library, digest = files(cache)
    draw, killed = random.Random(0), 0
    for n in range(24):
        at = draw.randrange(len(harmless))
        damaged = harmless[:at] if n % 2 else harmless[:at] + bytes([harmless[at] ^ 1 << draw.randrange(8)]) + harmless[at + 1 :]
        library.write_bytes(damaged)
        if n % 4 == 1:  # negative control: what the loader itself does with a file that was cut
            naive = [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"]
            killed += subprocess.run(naive, capture_output=True).returncode < 0
        assert fresh() == 7 and library.read_bytes() == harmless
        assert capsys.readouterr().err.count("\n") == 1
    assert killed
    for gone in (library, digest):
        gone.unlink()
        assert fresh() == 7 and gone.exists() and capsys.readouterr().err == ""


def link(path: Path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def other_user(path: Path):
    if os.geteuid():
        pytest.skip("only root can give files away")
    os.chown(path, 12345, -1)


FOLDERS = {
    "mode 777": lambda cache: cache.chmod(0o777),
    "mode 770": lambda cache: cache.chmod(0o770),
    "another user": other_user,
    "a link": link,
    "a file": lambda cache: (shutil.rmtree(cache), cache.write_text("")),
}
FILES = {
    "mode 666": lambda path: path.chmod(0o666),
    "another user": other_user,
    "a link": link,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


def plant(cache: Path, library: bytes):
    path, digest = files(cache)
    path.write_bytes(library)
    digest.write_text(hashlib.sha256(library).hexdigest())


@pytest.mark.parametrize("how", FOLDERS)
def test_a_folder_that_is_not_ours_alone_is_passed_over(cache, planted, capsys, how):
    library, mark = planted
    plant(cache, library)
    FOLDERS[how](cache)
    assert fresh() == 7 and not mark.exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("how", FILES)
def test_a_file_that_is_not_ours_alone_is_never_loaded(cache, planted, capsys, how, which):
    library, mark = planted
    plant(cache, library)
    FILES[how](files(cache)[which])
    assert fresh() == 7 and not mark.exists()
    assert 1 <= capsys.readouterr().err.count("\n") <= 2


def test_relative_folders_are_none(cache, planted, monkeypatch, tmp_path):
    library, mark = planted
    plant(cache, library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".cache").symlink_to("cache")
    for values in ({"XDG_CACHE_HOME": "cache"}, {"XDG_CACHE_HOME": "./cache"}, {"XDG_CACHE_HOME": "", "HOME": "."}):
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        assert fresh() == 7 and not mark.exists()
    ctypes.CDLL(str(files(cache)[0]))  # negative control: loading it leaves the mark
    assert mark.exists()


def test_without_any_cache_the_kernel_is_private(cache, monkeypatch, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")

    def nobody(*args):
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert fresh() == 7
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    assert fresh() == 7 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(ssm.tempfile, "TemporaryDirectory", lambda **_: (_ for _ in ()).throw(FileNotFoundError("no place")))
    ssm._native_scan.cache_clear()
    assert ssm._native_scan() is None and ssm.scan_kernel() == "chunked"
