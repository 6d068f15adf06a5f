"""How ranks come to be, are watched, and end: in this process, spawned, launched, or through Ray.

Owns processes and actors. Refuses to know the model and the documents. Importing it starts nothing.
"""
