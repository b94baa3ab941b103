"""The figures: pure functions of results and cards, without torch. `definitions` lists them, `write` writes them."""
