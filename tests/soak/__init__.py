"""Three rivals write to one node's nat tables at once, and snatd keeps its promises meanwhile."""
