"""Tables of forking tokens: against a loop, over batches, their rows, and two of them joined."""

import jax
import numpy as np
import pytest

from jentropy.data.tokenizer import CharTokenizer
from jentropy.theory import tokens as module
from jentropy.theory.tokens import TokenChange, TokenRow, TokenTable, compare, empty_table, merge, rows

accumulate = jax.jit(module.accumulate)
V = 7


def batch(seed, shape=(5, 8)):
    """Token ids 0 to 5, entropies and a mask; outside the mask ids are anything and entropies NaN."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.6
    tokens = np.where(mask, rng.integers(0, V - 1, shape), rng.integers(-9, 99, shape)).astype(np.int32)
    return tokens, np.where(mask, rng.exponential(size=shape), np.nan).astype(np.float32), mask


def table(**tokens):
    """A table of `t<id>=(count, mean entropy)`."""
    count, total = np.zeros(V, np.int32), np.zeros(V, np.float32)
    for name, (number, mean) in tokens.items():
        count[int(name[1:])], total[int(name[1:])] = number, number * mean
    return TokenTable(count, total)


def test_by_a_loop_over_two_batches():
    found, entropies = empty_table(V), {token: [] for token in range(V)}
    for tokens, entropy, mask in (batch(0), batch(1)):
        found = accumulate(found, tokens, entropy, mask)
        for i, t in zip(*np.nonzero(mask)):
            entropies[int(tokens[i, t])].append(float(entropy[i, t]))
    np.testing.assert_array_equal(found.count, [len(entropies[i]) for i in range(V)])
    np.testing.assert_allclose(found.entropy_sum, [sum(entropies[i]) for i in range(V)], rtol=1e-5)
    means = [np.mean(entropies[i]) if entropies[i] else 0.0 for i in range(V)]
    np.testing.assert_allclose(found.mean_entropy, means, rtol=1e-5)
    assert found.count.dtype == np.int32 and found.count[V - 1] == 0


def test_tables_of_batches_merge():
    one, other = (accumulate(empty_table(V), *batch(seed)) for seed in (0, 1))
    found, wanted = merge(one, other), accumulate(one, *batch(1))
    np.testing.assert_array_equal(found.count, wanted.count)
    np.testing.assert_allclose(found.entropy_sum, wanted.entropy_sum, rtol=1e-6)
    with pytest.raises(AssertionError):
        merge(one, empty_table(V + 1))


def test_padding_and_the_order_of_rows_change_nothing():
    wanted = accumulate(empty_table(V), *batch(0))
    order = np.random.default_rng(2).permutation(5)
    found = accumulate(empty_table(V), *(np.pad(x[order], ((0, 1), (0, 2))) for x in batch(0)))
    np.testing.assert_array_equal(found.count, wanted.count)
    np.testing.assert_allclose(found.entropy_sum, wanted.entropy_sum, rtol=1e-6)


def test_no_token_and_ids_outside_the_vocabulary():
    tokens, entropy, mask = batch(0)
    none = accumulate(empty_table(V), tokens, entropy, np.zeros_like(mask))
    jax.tree.map(np.testing.assert_array_equal, none, empty_table(V))
    assert rows(none) == [] and compare(none, none) == []
    outside = np.where(mask, np.where(tokens % 2 == 0, V, -1), 0).astype(np.int32)
    jax.tree.map(
        np.testing.assert_array_equal, accumulate(none, outside, np.where(mask, entropy, 1), mask), empty_table(V)
    )


def test_rows_are_sorted_by_mean_entropy():
    found = rows(table(t1=(4, 0.5), t2=(1, 2.0), t3=(2, 0.5), t6=(3, 1.5)))
    assert [(row.token, row.count, row.mean_entropy) for row in found] == [
        (2, 1, 2.0),
        (6, 3, 1.5),
        (1, 4, 0.5),
        (3, 2, 0.5),
    ]
    assert [row.fraction for row in found] == [0.1, 0.3, 0.4, 0.2]
    assert found[0].text == "<2>"


def test_rare_tokens_are_left_out_and_still_count_as_tokens():
    found = rows(table(t1=(4, 0.5), t2=(1, 2.0), t6=(3, 1.5)), min_count=3)
    assert found == [TokenRow(6, "<6>", 3, 0.375, 1.5), TokenRow(1, "<1>", 4, 0.5, 0.5)]


def test_texts_are_those_of_the_tokenizer():
    tokenizer = CharTokenizer("abcdef$", pad="a", eos="$")

    def decode(token):
        return tokenizer.decode_rows(np.array([[token]]), np.ones((1, 1), bool))[0]

    assert [row.text for row in rows(table(t1=(1, 0.5), t6=(1, 1.0)), decode)] == ["$", "b"]
    assert compare(table(t2=(1, 0.5)), table(), decode)[0].text == "c"


def test_two_tables_are_joined():
    before = table(t0=(5, 0.5), t1=(3, 2.0), t2=(9, 1.0), t3=(1, 3.0))
    after = table(t0=(7, 0.25), t1=(1, 0.5), t4=(4, 1.0), t5=(3, 2.0), t3=(2, 3.0))
    assert compare(before, after, min_count=3) == [
        TokenChange(1, "<1>", 3, 1, 2.0, 0.5),
        TokenChange(2, "<2>", 9, 0, 1.0, None),
        TokenChange(0, "<0>", 5, 7, 0.5, 0.25),
        TokenChange(5, "<5>", 0, 3, None, 2.0),
        TokenChange(4, "<4>", 0, 4, None, 1.0),
    ]
    assert [row.change for row in compare(before, after)] == [0.0, -1.5, None, -0.25, None, None]


def test_refusals():
    for call in (lambda: rows(table(), min_count=0), lambda: compare(table(), table(), min_count=0)):
        with pytest.raises(ValueError, match="min_count must be at least 1, got 0"):
            call()
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        empty_table(0)
    with pytest.raises(ValueError, match="the tables have vocabularies of 7 and 8 tokens"):
        compare(table(), empty_table(8))
    with pytest.raises(ValueError, match=r"a table has two arrays \[V\], got shapes \(7,\) and \(6,\)"):
        rows(TokenTable(np.zeros(7, np.int32), np.zeros(6, np.float32)))
