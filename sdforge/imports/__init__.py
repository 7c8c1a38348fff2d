"""`forge import`: what other programs were told to do, as a recipe.

A module is a kind of file, with `recognises(path, text)` and `read(path, text, draft, wishes)`, which fills a draft.
What a recipe cannot say, or says otherwise, is noted in words; nothing is left out in silence.
"""
