"""Lookup of launch configurations, and that tables and cases fit each other."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from farl_kernels import tables
from farl_kernels.cases import FOLDERS, all_cases, select

META = torch.device("meta")


def test_every_entry_has_one_case_and_every_case_an_entry() -> None:
    cased = Counter((case.op, case.kernel, case.bucket) for case in all_cases())
    assert [name for name, count in cased.items() if count > 1] == []
    for architecture in tables.architectures():
        entries = {
            (path.stem, kernel, bucket)
            for path in (tables.FOLDER / architecture).glob("*.json")
            for kernel, buckets in json.loads(path.read_text()).items()
            for bucket in buckets
        }
        assert sorted(entries - set(cased)) == [], architecture
        assert sorted(set(cased) - entries) == [], architecture


def test_formatted() -> None:
    path = tables.FOLDER / "sm_90" / "token_loss.json"
    assert path.read_text() == tables.formatted(json.loads(path.read_text()))


def test_every_folder_with_kernels_is_listed() -> None:
    package = tables.FOLDER.parent
    found = {".".join(path.parent.relative_to(package).parts) for path in package.rglob("kernels.py")}
    assert found == set(FOLDERS)


def test_select() -> None:
    names = [case.name for case in select(["token_loss.total", "token_loss.row.*_long"])[0]]
    assert names == ["token_loss.row.bits16_long", "token_loss.row.bits32_long", "token_loss.total.any"]
    assert select(["no such case"]) == ([], [])


def test_a_folder_that_cannot_be_imported_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farl_kernels.cases.FOLDERS", ("token_loss", "nowhere"))
    cases, faults = select([])
    assert {case.op for case in cases} == {"token_loss"}
    assert len(faults) == 1 and "farl_kernels.nowhere" in faults[0]
    assert select(["token_loss"])[1] == []


def test_override_and_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tables.lookup("token_loss", "total", "any", META)
    own, other = {"BLOCK": 64, "num_warps": 1, "num_stages": 1}, {"BLOCK": 32, "num_warps": 1, "num_stages": 1}
    (tmp_path / "token_loss.json").write_text(json.dumps({"total": {"any": own}}))
    monkeypatch.setenv(tables.ENVIRONMENT, str(tmp_path))
    assert tables.lookup("token_loss", "total", "any", META) == own
    with tables.override("token_loss", "total", "any", other):
        assert tables.lookup("token_loss", "total", "any", META) == other
        with tables.override("token_loss", "total", "any", shipped):
            assert tables.lookup("token_loss", "total", "any", META) == shipped
        assert tables.lookup("token_loss", "total", "any", META) == other
    assert tables.lookup("token_loss", "total", "any", META) == own
    # Entries that the folder lacks are the shipped ones.
    assert tables.lookup("token_loss", "row", "bits16_8192", META)
    monkeypatch.delenv(tables.ENVIRONMENT)
    assert tables.lookup("token_loss", "total", "any", META) == shipped
    with pytest.raises(KeyError):
        tables.lookup("token_loss", "total", "no such bucket", META)


def test_a_lookup_may_be_changed() -> None:
    tables.lookup("token_loss", "total", "any", META)["BLOCK"] = 0
    assert tables.lookup("token_loss", "total", "any", META)["BLOCK"] > 0


def test_recorded_lookups() -> None:
    with tables.recorded_lookups() as outer:
        tables.lookup("token_loss", "total", "any", META)
        with tables.recorded_lookups() as inner:
            tables.lookup("token_loss", "row", "bits16_long", META)
    assert outer == [("token_loss", "total", "any")] and inner == [("token_loss", "row", "bits16_long")]


@pytest.mark.parametrize(
    ("capability", "wanted"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((12, 0), "sm_90")]
)
def test_a_gpu_takes_the_newest_table_not_newer_than_itself(
    capability: tuple[int, int], wanted: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    tables._architecture_of_gpu.cache_clear()
    request.addfinalizer(tables._architecture_of_gpu.cache_clear)
    assert tables.architecture_of(torch.device("cuda", 0)) == wanted
    with tables.use_architecture("sm_80"):
        assert tables.architecture_of(torch.device("cuda", 0)) == "sm_80"
