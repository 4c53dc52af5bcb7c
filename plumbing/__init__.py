"""How llama31.py is made fast, how its files look, how a run is kept: nothing here imports a script."""
