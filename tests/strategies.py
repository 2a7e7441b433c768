"""What the property tests draw."""

from __future__ import annotations

from hypothesis import strategies as st

# A lone surrogate, which JSON can write and no answer can hold, is among the texts.
JSON_TEXT = st.text(max_size=8) | st.just("\ud800")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | JSON_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(JSON_TEXT, inner, max_size=3),
    max_leaves=6,
)
"""Any plain data that a JSON body can be."""
