import pytest
from hypothesis import given
from hypothesis import strategies as st

from pelton.engine.kv_blocks import BlockPool
from pelton.engine.prefix_cache import CachePolicy


def test_a_block_is_free_again_only_when_its_last_holder_frees_it():
    blocks = BlockPool(3)
    held = blocks.allocate(2)
    blocks.fork(held)
    blocks.free(held)
    assert blocks.num_free == 1
    assert [blocks.references(b) for b in held] == [1, 1]
    blocks.free(held)
    assert blocks.num_free == 3
    blocks.check([])


def test_freeing_twice_is_refused():
    blocks = BlockPool(2)
    held = blocks.allocate(1)
    blocks.free(held)
    with pytest.raises(RuntimeError, match="freed twice"):
        blocks.free(held)


def test_forking_a_free_block_is_refused():
    with pytest.raises(RuntimeError, match="forked while free"):
        BlockPool(2).fork([1])


def test_more_blocks_than_are_free_are_refused_and_none_is_taken():
    blocks = BlockPool(2)
    with pytest.raises(RuntimeError, match="3 KV blocks wanted, 2 free"):
        blocks.allocate(3)
    assert blocks.num_free == 2


def test_check_names_a_block_that_nobody_holds():
    blocks = BlockPool(2)
    blocks.allocate(1)
    with pytest.raises(RuntimeError, match="1 references, 0 sequences"):
        blocks.check([])


@given(st.integers(1, 6), st.lists(st.tuples(st.sampled_from(["allocate", "fork", "free"]), st.integers(0, 7))))
def test_any_order_of_operations_keeps_the_books(num_blocks, operations):
    blocks = BlockPool(num_blocks)
    held: list[tuple[int, ...]] = []
    for operation, number in operations:
        if operation == "allocate" and number <= blocks.num_free:
            held.append(blocks.allocate(number))
        elif held and operation == "fork":
            held.append(held[number % len(held)])
            blocks.fork(held[-1])
        elif held and operation == "free":
            blocks.free(held.pop(number % len(held)))
        blocks.check(held)
        assert blocks.num_free == num_blocks - len({b for ids in held for b in ids})


def test_a_block_that_nobody_holds_can_be_forgotten():
    pool = BlockPool(2, caching=True)
    (block,) = pool.allocate(1)
    pool.remember(block, b"key", CachePolicy(), 0.0)
    pool.free([block])
    assert (pool.num_free, pool.num_cached) == (2, 1)
    pool.forget(block)
    pool.check([])
    assert (pool.num_free, pool.num_cached) == (2, 0)
    assert pool.find([b"key"]) == ([], 0)
    assert set(pool.allocate(2)) == {0, 1}
