"""Modules: parameters and one op call each, state_dict-compatible with torch.nn."""
