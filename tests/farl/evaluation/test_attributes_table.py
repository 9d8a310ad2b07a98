from __future__ import annotations

from pathlib import Path

import pytest
import torch

from farl.evaluation.attributes_table import hash_share, match_rows, read_attributes


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "attributes.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_binary_columns_people_and_gaps(tmp_path: Path) -> None:
    path = table(tmp_path, "\ufeffimage,person,Smiling,Hat,age\nimages/a.jpg,7,1,-1,33\nimages/b.png,8,true,,41\n")
    attributes = read_attributes(path)
    assert attributes.keys == ["images/a.jpg", "images/b.png"]
    assert attributes.names == ["Smiling", "Hat"]
    assert attributes.groups == ["7", "8"] and attributes.group_column == "person"
    assert attributes.ignored == ["age"]
    assert attributes.labels[:, 0].tolist() == [1, 1]
    assert attributes.labels[0, 1] == 0 and attributes.labels[1, 1].isnan()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,Hat\n", "has no rows"),
        ("image,Hat\na.jpg,1\nb.jpg\n", "row 3 has 1 cells"),
        ("image,age\na.jpg,44\n", "no column of 0/1 labels"),
    ],
)
def test_refuses_what_is_not_such_a_table(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_attributes(table(tmp_path, text))


def test_matches_keys_by_path_then_by_stem(tmp_path: Path) -> None:
    attributes = read_attributes(
        table(tmp_path, "image,Hat\nimages/one.jpg,1\nleft/two.v1.jpg,0\nright/two.v1.jpg,1\nthree,0\n")
    )
    keys = ["one", "left/two.v1", "two.v1", "some/three", "images/one", "four"]
    # "two.v1" alone could be either of two rows, so it is none.
    assert match_rows(attributes, keys).tolist() == [0, 1, -1, 3, 0, -1]
    with pytest.raises(ValueError, match="no sample matches"):
        match_rows(attributes, ["x", "y"])


def test_hash_share_is_fixed_by_name_and_seed() -> None:
    names = [str(i) for i in range(2000)]
    shares = hash_share([*names, "0"], 0)
    assert shares[-1] == shares[0]
    assert abs((shares < 0.3).double().mean().item() - 0.3) < 0.04
    assert not torch.equal(hash_share(names, 1), shares[:-1])
