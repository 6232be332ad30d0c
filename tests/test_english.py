"""A Tatoeba file that can't be read is refused with its name, the line and a remedy."""

import bz2

import pytest

from compute_layers.skills.english import tatoeba, with_common_words

GOOD = "1\teng\tThe gold is here.\n2\tdeu\tDas Gold ist hier.\n"


def test_reads_one_language_and_leaves_long_sentences_out(tmp_path):
    """Windows line ends, empty lines and doubles are no trouble."""
    file = tmp_path / "s.tsv"
    file.write_bytes((GOOD + "\n3\teng\tThe gold is here!\n4\teng\t" + "very " * 20 + "long\n").replace("\n", "\r\n").encode())
    assert tatoeba(file) == ["the gold is here"]
    assert tatoeba(file, language="deu") == ["das gold ist hier"]
    assert len(tatoeba(file, max_words=30)) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD.encode() + b"3;eng;semicolons\n", ["line 3", "expected id<TAB>language<TAB>sentence", "1 column(s)"]),
        (GOOD.encode() + b"3\teng\ttext\tCK\t2010\n", ["line 3", "5 column(s)", "not the detailed one"]),
        (b"eng\t1\tswapped\n", ["line 1", "expected id<TAB>"]),
        (bz2.compress(GOOD.encode() * 50), ["line 1", "bunzip2"]),
        (b"2\tdeu\tDas Gold.\n", ["no sentence of language 'eng'", "deu (1)"]),
        (b"", ["no sentences at all"]),
    ],
)
def test_a_wrong_file_names_line_and_remedy(content, says, tmp_path):
    """Whatever is wrong, the file's name is in the message."""
    file = tmp_path / "wrong.tsv"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        tatoeba(file)
    assert all(part in str(error.value) for part in ["wrong.tsv", *says]), str(error.value)


def test_a_missing_file_says_where_to_get_one(tmp_path):
    """The repository does not ship one."""
    with pytest.raises(FileNotFoundError, match="tatoeba.org"):
        tatoeba(tmp_path / "none.tsv")
    (tmp_path / "s.tsv").write_text(GOOD)
    with pytest.raises(ValueError, match="max_words"):
        tatoeba(tmp_path / "s.tsv", max_words=0)


def test_common_words_close_the_vocabulary():
    """Words of `always` are allowed however rare they are."""
    texts = ["a b", "a b", "a c", "d a"]
    assert with_common_words(texts, most=2) == ["a b", "a b"]
    assert with_common_words(texts, most=2, always=["c"]) == ["a b", "a b", "a c"]
