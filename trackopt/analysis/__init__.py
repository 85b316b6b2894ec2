"""Turn the tree of a checkpoint into facts about it. Nothing here prints."""
