"""Wire formats, a folder each: `wire` is a pure pair of decode and encode, `routes` its HTTP routes."""
