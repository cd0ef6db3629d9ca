"""Published lists hold what their sources say; lists of users are read in every form, and mistakes are named."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from nnunetv2_dycon.conversion.protocols import PUBLISHED, Protocol, find_protocol, read_names, read_protocol
from nnunetv2_dycon.dataset_conversion import CONVERTERS, converter
from nnunetv2_dycon.errors import ConfigError, SplitError

# Training, validation and test cases; labelled numbers; whether the labelled are the first of the training list.
COUNTS = {
    "isles22_dycon_fold0": ((200, 25, 25), (10, 20, 40), True),
    "isles22_dycon_fold1": ((200, 25, 25), (10, 20, 40), True),
    "isles22_dycon_fold2": ((200, 25, 25), (10, 20, 40), True),
    "brats19_250_25_60": ((250, 25, 60), (25, 50), True),
    "la_80_20": ((80, 0, 20), (4, 8, 16), True),
    "pancreas_coranet_bcp": ((62, 0, 18), (6, 12), True),
    "pancreas_dycon": ((62, 0, 20), (6, 12), True),
    "pancreas_dycon_fold1": ((62, 0, 20), (6, 12), True),
    "pancreas_dycon_fold2": ((61, 0, 21), (6, 12), True),
    "pancreas_dycon_fold3": ((61, 0, 21), (6, 12), True),
    "pancreas_mcnet": ((62, 0, 20), (6, 12), True),
    "btcv_dhc_v1": ((20, 4, 6), (2, 4, 8), False),
    "btcv_genericssl": ((20, 4, 6), (4,), False),
    "btcv_skcdf": ((20, 4, 6), (2, 4, 8), False),
    "btcv_magicnet_18_12": ((18, 0, 12), (5, 7), False),
}


def plain(text: str) -> str:
    return text


def published(name: str) -> Protocol:
    return read_protocol(PUBLISHED / f"{name}.json", plain)


def everybody(protocol: Protocol) -> set[str]:
    return {*protocol.train, *protocol.val, *protocol.test}


def write(path: Path, content: object, encoding: str = "utf-8") -> Path:
    path.write_text(json.dumps(content), encoding=encoding)
    return path


# ---- published ---------------------------------------------------------------------------------------------


def test_every_published_file_belongs_to_one_converter_and_the_default_is_the_papers() -> None:
    lists = {name: converter(name).COLLECTION.protocols for name in CONVERTERS}
    assert sorted(p for names in lists.values() for p in names) == sorted(COUNTS)
    assert sorted(path.stem for path in PUBLISHED.glob("*")) == sorted(COUNTS)
    assert {name: names[0] for name, names in lists.items()} == {
        "ISLES22": "isles22_dycon_fold0",
        "BraTS19": "brats19_250_25_60",
        "LA": "la_80_20",
        "PancreasNIH": "pancreas_coranet_bcp",
        "BTCV": "btcv_dhc_v1",
    }


@pytest.mark.parametrize("name", COUNTS)
def test_a_published_list_has_its_counts_its_source_and_no_case_in_two_roles(name: str) -> None:
    protocol = published(name)
    counts, labeled, first = COUNTS[name]
    assert (len(protocol.train), len(protocol.val), len(protocol.test)) == counts
    assert len(everybody(protocol)) == sum(counts)
    assert tuple(sorted(protocol.labeled)) == labeled
    assert all(len(cases) == number for number, cases in protocol.labeled.items())
    assert all(set(cases) <= set(protocol.train) for cases in protocol.labeled.values())
    assert protocol.first_are_labeled is first
    assert protocol.name == name
    assert len(protocol.source) > 10


@pytest.mark.parametrize("name", COUNTS)
def test_labeled_lists_are_nested_but_for_two_of_btcv_that_are_not(name: str) -> None:
    lists = [set(cases) for _, cases in sorted(published(name).labeled.items())]
    nested = all(small <= large for small, large in combinations(lists, 2))
    assert nested is (name not in ("btcv_dhc_v1", "btcv_skcdf"))


def test_the_four_lists_of_btcv_each_cover_the_thirty_public_cases() -> None:
    thirty = {f"{n:04d}" for n in (*range(1, 11), *range(21, 41))}
    lists = [published(name) for name in COUNTS if name.startswith("btcv")]
    assert len(lists) == 4
    assert all(everybody(protocol) == thirty for protocol in lists)
    assert len({protocol.train for protocol in lists}) == 4  # and no two are the same


def test_the_lists_of_isles_cover_250_cases_and_their_test_lists_overlap_as_published() -> None:
    lists = [published(f"isles22_dycon_fold{fold}") for fold in range(3)]
    everyone = {f"sub-strokecase{n:04d}" for n in range(1, 251)}
    assert all(everybody(protocol) == everyone for protocol in lists)
    shared = [len(set(a.test) & set(b.test)) for a, b in combinations(lists, 2)]
    assert shared == [5, 2, 3]
    assert len(set().union(*(protocol.test for protocol in lists))) == 66


def test_the_lists_of_the_pancreas_name_82_or_80_cases() -> None:
    all_82 = {f"{n:04d}" for n in range(1, 83)}
    for name in COUNTS:
        if name.startswith("pancreas"):
            expected = all_82 - {"0025", "0070"} if name == "pancreas_coranet_bcp" else all_82
            assert everybody(published(name)) == expected
    tests = [set(published(f"pancreas_dycon{part}").test) for part in ("", "_fold1", "_fold2", "_fold3")]
    assert sum(map(len, tests)) == len(set().union(*tests)) == 82


def test_brats_has_the_sites_that_were_counted_and_la_ids_of_twenty_characters() -> None:
    cases = everybody(published("brats19_250_25_60"))
    sites = [case.split("_")[1] for case in cases]
    assert (sites.count("CBICA"), sites.count("2013"), sites.count("TMC")) == (129, 30, 9)
    assert sum(site.startswith("TCIA") for site in sites) == 167
    la = published("la_80_20")
    assert all(len(case) == 20 and case.isalnum() for case in everybody(la))
    assert list(la.train) == sorted(la.train)


@pytest.mark.parametrize(
    ("collection", "written", "name"),
    [
        ("BTCV", "1", "img0001"),
        ("BTCV", "label0021.nii.gz", "img0021"),
        ("BTCV", "0004.h5", "img0004"),
        ("PancreasNIH", "image0001_norm.h5", "PANCREAS_0001"),
        ("PancreasNIH", "PANCREAS_0082.h5", "PANCREAS_0082"),
        ("PancreasNIH", " 7 ", "PANCREAS_0007"),
        ("ISLES22", "strokecase0009", "sub-strokecase0009"),
        ("ISLES22", "150", "sub-strokecase0150"),
        ("BraTS19", "BraTS19_2013_0_1.h5", "BraTS19_2013_0_1"),
        ("BraTS19", "BraTS19_CBICA_AAP_1", "BraTS19_CBICA_AAP_1"),
        ("LA", "06SR5RBREL16DQ6M8LWS", "06SR5RBREL16DQ6M8LWS"),
        ("BTCV", "case0005.npy.h5", "img0005"),
        ("BTCV", "img0021_0000.nii.gz", "img0021"),
        ("PancreasNIH", "PANCREAS_0001_0000.nii.gz", "PANCREAS_0001"),
        ("PancreasNIH", "pancreas0012_2.h5", "PANCREAS_0012"),
        ("ISLES22", "sub-strokecase0123_ses-0001", "sub-strokecase0123"),
        ("ISLES22", "strokecase0123_ses-0001_dwi.nii.gz", "sub-strokecase0123"),
    ],
)
def test_ids_become_case_names_however_lists_write_them(collection: str, written: str, name: str) -> None:
    assert converter(collection).COLLECTION.case_name(written) == name


@pytest.mark.parametrize("name", CONVERTERS)
def test_case_names_stay_as_they_are(name: str) -> None:
    collection = converter(name).COLLECTION
    for protocol in collection.protocols:
        cases = everybody(read_protocol(PUBLISHED / f"{protocol}.json", collection.case_name))
        assert {collection.case_name(case) for case in cases} == cases
        assert len(cases) == sum(COUNTS[protocol][0])


# ---- found by name -----------------------------------------------------------------------------------------


def test_a_protocol_is_found_by_its_name_its_end_or_its_file(tmp_path: Path) -> None:
    names = ["pancreas_dycon", "pancreas_dycon_fold1", "pancreas_dycon_fold2"]
    assert find_protocol("pancreas_dycon", names, plain).name == "pancreas_dycon"
    assert find_protocol("fold2", names, plain).name == "pancreas_dycon_fold2"
    own = write(tmp_path / "own.json", {"train": ["a"], "test": ["b"]})
    assert find_protocol(own, names, plain).train == ("a",)
    assert find_protocol(str(own), (), plain).name == "own"
    for wrong in ("fold", "fold3", "dyco", "pancreas"):
        with pytest.raises(ConfigError, match=f"--protocol {wrong}: no such protocol; give one of pancreas_dycon"):
            find_protocol(wrong, names, plain)
    with pytest.raises(ConfigError, match="give a JSON file"):
        find_protocol("x", (), plain)


def test_an_end_that_fits_two_protocols_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such protocol"):
        find_protocol("fold1", ["isles_fold1", "pancreas_fold1"], plain)


# ---- files of users ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("labeled", "unlabeled"), [("labeled", "unlabeled"), ("labelled", "unlabelled")])
def test_json_of_a_user_is_read_in_both_spellings_with_or_without_a_mark(
    tmp_path: Path, encoding: str, labeled: str, unlabeled: str
) -> None:
    content = {labeled: ["a", 2], unlabeled: ["c"], "val": ["d"], "test": ["e é"]}
    protocol = read_protocol(write(tmp_path / "own.json", content, encoding), plain)
    assert protocol.train == ("a", "2", "c")
    assert protocol.labeled == {2: ("a", "2")}
    assert (protocol.val, protocol.test, protocol.name) == (("d",), ("e é",), "own")


def test_train_may_be_given_in_place_of_unlabeled_and_labeled_by_number(tmp_path: Path) -> None:
    content = {"labeled": {"1": ["b"], "2": ["c", "b"]}, "train": ["a", "b", "c"]}
    protocol = read_protocol(write(tmp_path / "own.json", content), plain)
    assert (protocol.train, protocol.labeled) == (("a", "b", "c"), {1: ("b",), 2: ("c", "b")})
    assert protocol.first_are_labeled is False
    assert read_protocol(write(tmp_path / "own.json", content | {"unlabeled": ["a"]}), plain) == protocol


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_text_lists_are_read_with_any_line_end_comments_and_blanks(tmp_path: Path, newline: str, mark: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes((mark + newline.join(["# mine", " a ", "", "b\t", "c"])).encode())
    assert read_names(path, plain) == ("a", "b", "c")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names no case"),
        (b"# only a comment\n\n", "names no case"),
        (b"a\nb\na\n", "names 'a' twice"),
        (b"\xff\xfe\x00a", "cannot be read as a list"),
    ],
)
def test_text_lists_that_cannot_be_used_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(SplitError, match=words) as caught:
        read_names(path, plain)
    assert str(path) in str(caught.value)
    with pytest.raises(SplitError, match="cannot be read"):
        read_names(tmp_path / "none.txt", plain)


def test_two_spellings_of_one_case_are_a_case_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("img0001\n1\n", encoding="utf-8")
    with pytest.raises(SplitError, match="names 'img0001' twice"):
        read_names(path, converter("BTCV").COLLECTION.case_name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "must be {"),
        ({"train": ["a", "a"]}, "\"train\" names 'a' twice"),
        ({"train": ["a"], "val": ["a"]}, '\'a\' is in both "train" and "val"'),
        ({"train": ["a"], "test": ["a"]}, '\'a\' is in both "train" and "test"'),
        ({"train": ["b"], "val": ["a"], "test": ["a"]}, '\'a\' is in both "val" and "test"'),
        ({"labeled": ["a"], "unlabeled": ["a", "b"]}, "names 'a' twice"),
        ({"labeled": ["z"], "train": ["a"]}, "'z' is not in \"train\""),
        ({"labeled": ["a"], "train": ["a", "b"], "unlabeled": ["z"]}, "unlabelled case 'z' is not in \"train\""),
        ({"labeled": {"2": ["a"]}, "train": ["a"]}, '"labeled" 2 lists 1 cases'),
        ({"labeled": {"few": ["a"]}, "train": ["a"]}, "number: list of ids"),
        ({"labeled": "a", "train": ["a"]}, "must be a list of ids"),
        ({"train": "abc"}, '"train" must be a list'),
        ({"train": [["a"]]}, '"train" must be a list'),
        ({"train": ["a"], "counts": {"train": 2}}, '"train" lists 1 cases, its "counts" say 2'),
    ],
)
def test_a_wrong_protocol_is_refused_in_one_line_that_names_the_file(tmp_path, content, words: str) -> None:
    path = write(tmp_path / "own.json", content)
    with pytest.raises(SplitError) as caught:
        read_protocol(path, plain)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[1, 2"])
def test_a_file_that_is_no_json_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(content)
    with pytest.raises(SplitError, match="not JSON") as caught:
        read_protocol(path, plain)
    assert "\n" not in str(caught.value)
