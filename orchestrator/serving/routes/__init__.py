"""The service's routes, a file for each kind of thing; `app.py` mounts them."""
