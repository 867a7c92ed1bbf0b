"""Claims about what is said before anything is dialled: addresses, certificates and folders that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsys.decentral import credentials
from llmsys.decentral.__main__ import main


@pytest.mark.parametrize("text", ["localhost", "7077", "127.0.0.1:99999", "127.0.0.1:-1", ":7077"])
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"^--listen {text}: must be HOST:PORT"):
        credentials.address("--listen", text)
    assert credentials.address("--listen", "127.0.0.1:0") == ("127.0.0.1", 0)


PROVIDER = ("provider", "--join", "127.0.0.1:1", "--tflops=1", "--mem-gib=1")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["status", "--join", "localhost", "--token-file", "token"], "--join localhost: must be HOST:PORT"),
        (["status", "--join", "127.0.0.1:0", "--token-file", "token"], "--join 127.0.0.1:0: must be HOST:PORT"),
        (["status", "--join", "broker.example.org:1", "--token-file", "token"],
         "--join broker.example.org:1: beyond loopback the broker's certificate.pem is needed: --certificate FILE"),
        ([*PROVIDER, "--token-file", "token", "--join", "192.0.2.7:1"], "--join 192.0.2.7:1: beyond loopback"),
        (["status", "--join", "127.0.0.1:1", "--token-file", "none"], "none: No such file or directory"),
        (["status", "--join", "127.0.0.1:1", "--token-file", "token", "--certificate", "token"],
         "--certificate token: is none; it is the broker's certificate.pem"),
        ([*PROVIDER, "--token-file", "token", "--name", "cléa"], "--name cléa: must be text of 64 characters at most"),
        ([*PROVIDER, "--token-file", "token", "--patience=-2"], "--patience -2.0: must be 0 or more"),
        (["broker", "--credentials", "nowhere", "+exp=decentral_train"], "nowhere: has no token; `certificate"),
        (["broker", "--credentials", ".", "--listen", "h:99999", "+exp=x"], "--listen h:99999: must be HOST:PORT"),
        (["probe", "--credentials", ".", "--fleet", "no/where.yaml"], "--fleet no/where.yaml: there is no such folder"),
        (["certificate", "made", "--host", ""], "--host: none; it is the name or the address"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_dialled(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("of this test\n")
    assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line
