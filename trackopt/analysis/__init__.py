"""From the tree of a checkpoint to facts about it; nothing here prints."""
