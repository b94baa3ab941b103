"""What a run on several machines tells whoever looks at it."""


class View:
    """Keeps what it hears."""

    def __init__(self, on_progress=lambda done: None):
        self.notes, self.on_progress, self.most = [], on_progress, 0

    def note(self, text):
        self.notes.append(text)

    def update(self, finished, asked):
        pass

    def progress(self, title, done, total):
        assert done <= total
        self.total = total
        self.on_progress(done)
