"""Pictures that stages leave beside their results, and where a report finds them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np

from lungseg.stages.fits import NamedFit
from lungseg.store.cases import Store

log = logging.getLogger(__name__)

EMBEDDING, SAMPLES = "embedding.png", "samples.png"


def drawn(make: Callable[[], bytes], what: str) -> bytes | None:
    """The picture that ``make`` draws; None, with a warning, where matplotlib is missing (a node of a cluster)."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        log.warning("%s is not drawn, as matplotlib is not installed", what)
        return None
    return make()


def embedding_picture(store: Store, case_ids: Sequence[str], name: str, fitted: NamedFit) -> dict[str, bytes]:
    """``embedding.png`` of the tokens a fit was made of, for its folder; empty where matplotlib is missing.

    Equally many tokens per case, from their samples ``tokens.<name>.h5``, which are in random order.
    """
    from lungseg.report.embedding_map import MAX_POINTS, embedding_map_png

    share = max(1, MAX_POINTS // len(case_ids))
    tokens, density = [], []
    for case_id in case_ids:
        with store.open(case_id, "tokens", name) as sample:
            tokens.append(sample.read("features", (slice(0, share),)))
            median = sample.provenance["statistics"].index("median_hu")
            density.append(sample.read("statistics", (slice(0, share),))[:, median])
    # mixed, so that no case lies over the others
    order = np.random.Generator(np.random.Philox(len(tokens))).permutation(sum(map(len, tokens)))
    joined, hu = np.concatenate(tokens)[order], np.concatenate(density)[order]
    tissues = [component.tissue for component in fitted.names]
    picture = drawn(lambda: embedding_map_png(joined, fitted.mixture.posterior(joined), hu, tissues), EMBEDDING)
    return {} if picture is None else {EMBEDDING: picture}
