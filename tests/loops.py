"""Every compiled loop of the package on small, awkward inputs, beside the same answer from NumPy or torch.

`test_memory.py` runs this in a process with NUMBA_BOUNDSCHECK=1: there an index beyond an array is an IndexError. Without
that setting a compiled loop reads or writes whatever lies behind the array. The last line lists the loops that ran.
"""
import argparse
import sys

import numba
import numpy as np
import torch
from scipy import sparse

from domainmix import batches, core, evaluation, jaccard, knn
from domainmix.core import compile_loop

THREADS = (1, 2, 3, 7, 16)
COMPILED = {}                                 # name -> what numba made of it


class RecordingNumba:
    "numba for `compile_loop`; keeps what it makes."
    @staticmethod
    def njit(**options):
        def compiled(loop):
            COMPILED[loop.__name__] = numba.njit(**options)(loop)
            return COMPILED[loop.__name__]
        return compiled


def beyond(a: np.ndarray) -> float:
    "Reads the entry behind the last one: proof that bounds are checked."
    return a[len(a)]


def check_that_bounds_are_checked() -> None:
    try: compile_loop(beyond)(np.zeros(4, np.float32))
    except IndexError: return
    sys.exit("bounds are not checked: start this with NUMBA_BOUNDSCHECK=1")


def same(got, wanted, what, atol=0.) -> None:
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, f"{what}: {got.shape}, and not {wanted.shape}"
    assert np.allclose(got, wanted, rtol=0, atol=atol, equal_nan=True), f"{what}: off by {np.abs(got - wanted).max()}"


def feature_sets():
    "Unit rows: one, two, odd numbers around a block of 64, duplicates, all the same."
    random = np.random.default_rng(0)
    for n in (1, 2, 7, 63, 65, 130):
        x = random.standard_normal((n, 5)).astype(np.float32)
        yield f"{n} rows", knn.unit_rows(torch.from_numpy(x))
    yield "duplicates", knn.unit_rows(torch.from_numpy(x[np.arange(66) // 3]))
    yield "all the same", knn.unit_rows(torch.from_numpy(x[np.zeros(67, int)]))


def neighbours(name, x) -> None:
    "`insert_topk`: lists as long as one and as all rows, tiles that do not divide the rows."
    n, insert = len(x), compile_loop(knn.insert_topk)
    for m, tile in {(1, 1), (min(n, 3), 3), (n, 64), (min(n, 5), 1024), (n, n + 1)}:
        if n > 70 and tile < 3: continue
        value, column = knn.topk_symmetric(x, m, tile=tile, insert=insert)
        products = x @ x.T
        same(value, products.topk(m).values, f"{name}: {m} neighbours in tiles of {tile}", 1e-6)
        same(products.gather(1, column.long()), value, f"{name}: columns", 1e-6)
    rank, _ = knn.knn(x, n + 5)               # more neighbours than rows
    assert rank.shape == (n, n)


def products_of_pairs(name, x) -> None:
    "`pair_products_loop`: no pairs, one, and many."
    for size in (0, 1, 77):
        i, j = (torch.from_numpy(np.random.default_rng(s).integers(0, len(x), size)) for s in (1, 2))
        same(knn.pair_products(x, i, j), (x[i] * x[j]).sum(1), f"{name}: {size} pairs", 1e-6)


def dense(n, bounds, columns, values) -> np.ndarray:
    return sparse.csr_array((values, columns, bounds.astype(np.int64)), shape=(n, n)).toarray()


def expansion(name, rank) -> sparse.csr_array:
    "`expand_loop` with its helper `with_room`: k from 1 to more than there are rows."
    n = len(rank)
    for k in (1, 4, n + 3):
        full, half = jaccard.reciprocal_neighbours(rank, k), jaccard.reciprocal_neighbours(rank, round(k / 2))
        got, (bounds, columns) = jaccard.expand_neighbours(full, half), jaccard.expand_by_products(full, half)
        same(got.toarray(), dense(n, bounds, columns, np.ones(len(columns))), f"{name}: expanded by {k}")
    return got


def similarities(name, x, pattern, rank, similarity) -> None:
    "`known_similarities`: lists that hold all pairs, some, and one each."
    for m in {1, min(3, len(x)), len(x)}:
        lists = np.ascontiguousarray(rank[:, :m]), np.ascontiguousarray(similarity[:, :m])
        got, missing = jaccard._look_up_similarities(pattern, *lists)
        wanted, absent = jaccard.known_similarities_by_arrays(pattern.indptr, pattern.indices, *lists)
        same(missing, absent, f"{name}: missing of {m}")
        same(got[~missing], wanted[~absent], f"{name}: similarities of {m}")


def averages(name, V, rank) -> None:
    "`average_rows`: the mean of one row to all."
    for k in {1, min(2, len(rank)), len(rank)}:
        got = jaccard.query_expansion(V, rank, k)
        wanted = dense(len(rank), *jaccard.average_by_product(np.ascontiguousarray(rank[:, :k]), V))
        same(got.toarray(), wanted, f"{name}: mean of {k} rows", 1e-6)


def sums_of_minima(name, V) -> None:
    "`overlap_loop` with `move_block`, `drop_small_entries` with `choose_cut`, `pair_overlaps`: tiles, threads, thresholds."
    n, full = V.shape[0], V.toarray()
    wanted = np.stack([np.minimum(row, full).sum(1) for row in full])
    for (tile, threads), least in zip(((1, 16), (7, 3), (64, 7), (4096, 2), (n, 1)), (0., .2, .3, .9, 1e-3)):
        torch.set_num_threads(threads)
        i, j, s = jaccard.OverlapSums(V, least, tile)()
        same(s, wanted[i, j], f"{name}: sums in tiles of {tile}", 1e-5)
        found = np.zeros_like(wanted, bool)
        found[i, j] = True
        sure = np.triu(wanted > max(least, 1e-7) + 1e-5)
        assert (found >= sure).all() and not np.tril(found, -1).any(), f"{name}: pairs of at least {least}"


def empty_graphs() -> None:
    "Matrices of one to three rows without entries, and with empty rows at both ends."
    for n in (1, 3):
        V = sparse.csr_array((n, n), dtype=np.float32)
        for least in (0., .3): assert not len(jaccard.OverlapSums(V, least)()[0])
    V = sparse.csr_array(np.diag(np.float32([0, 1, 0])))
    assert [int(a[0]) for a in jaccard.OverlapSums(V, .3)()] == [1, 1, 1]
    half = sparse.csr_array((3, 3), dtype=np.float32)
    assert (jaccard.expand_neighbours(V, half).toarray() == V.toarray()).all()
    same(jaccard.query_expansion(V, np.int32([[0], [1], [1]]), 1).toarray(), np.diag([0, 1, 0])[[0, 1, 1]], "empty rows")


def clusters() -> None:
    for name, x in feature_sets():
        neighbours(name, x)
        products_of_pairs(name, x)
        rank, similarity = knn.knn(x, len(x))
        pattern = expansion(name, rank)
        similarities(name, x, pattern, rank, similarity)
        V = jaccard.encode_neighbours(x, pattern, rank, similarity)
        averages(name, V, rank)
        sums_of_minima(name, V)
        sums_of_minima(f"{name}, few", jaccard._smoothed_rows(x, rank, similarity, 3, 2))
    empty_graphs()


def rankings() -> None:
    "`count_nearer`: no query, galleries around a block of 4096, no right answer, equal distances."
    g = torch.Generator().manual_seed(0)
    for queries, gallery, right in ((0, 3, 1), (1, 1, 1), (2, 4095, 3), (3, 4096, 64), (2, 4097, 1), (1, 9000, 5)):
        distance = (torch.rand(queries, gallery, generator=g) * 50).round()
        matches = distance[:, :right].clone()
        if queries > 1: matches[0] = torch.inf
        matches = matches.sort(1).values
        got = torch.full(matches.shape, -1)
        compile_loop(evaluation.count_nearer)(distance.numpy(), matches.numpy(), got.numpy())
        wanted = (distance[:, None] <= matches[:, :, None]).sum(2) * (matches < torch.inf)
        same(got, wanted, f"{queries} queries in a gallery of {gallery}")


def augmentations() -> None:
    "`augment_loop`: images of one pixel and of odd sizes, borders wider than the image, rectangles of the whole image."
    g = torch.Generator().manual_seed(0)
    for size in ((1, 1), (1, 7), (5, 3), (64, 31)):
        images = torch.randint(0, 256, (9, 3, *size), generator=g, dtype=torch.uint8)
        for pad, area in ((0, (.9, 1.)), (10, (.02, .4)), (3000, (.02, .4))):
            config = batches.AugmentConfig(pad=pad, erase=.9, erase_area=area)
            for u in (batches.augmentation_numbers(9, g), *(torch.full((9, 26), v, dtype=torch.float64) for v in (0, 1 - 1e-9))):
                got = batches.augment_compiled(images, u, config, compile_loop(batches.augment_loop))
                plain = batches.normalise(batches.flip_and_shift(images, u, config))
                same(got, batches.erase_rectangles(plain, u, config), f"images of {size}, padding {pad}", 1e-6)
    batches.augment(images[:0], config, g)


PARTS = {"clusters": clusters, "rankings": rankings, "augmentations": augmentations}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", default=list(PARTS), help=f"which of {', '.join(PARTS)}")
    core._import_numba = lambda: RecordingNumba
    check_that_bounds_are_checked()
    for part in p.parse_args().parts: PARTS[part]()
    print("ran:", *sorted(name for name, loop in COMPILED.items() if loop.signatures and name != "beyond"))


if __name__ == "__main__": main()
