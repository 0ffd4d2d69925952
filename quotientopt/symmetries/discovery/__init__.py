"""Symmetries of models that no adapter knows, found from gradients and proved.

In reading order: :mod:`.gradients` (what is kept of a run forwards and backwards), :mod:`.point`
(the model that runs), :mod:`.charges`, :mod:`.pairs` and :mod:`.queries_keys` (rows that belong
together), :mod:`.claims`, :mod:`.proof`, and :mod:`.discover`, which does it all.
"""

from quotientopt.symmetries.discovery.claims import FoundStream
from quotientopt.symmetries.discovery.discover import Discovery, discover

__all__ = ["Discovery", "FoundStream", "discover"]
