"""How the channels of a level move on failing and on clean continuations of the same prefix (Observation 2)."""
