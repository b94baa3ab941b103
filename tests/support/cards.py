"""Model cards: one with every table, and the beginning of a small one."""

SHA = "0123456789abcdef" * 4

FULL = f"""\
# A card with every table.
version = 1
title = "Smoothed and squeezed"
dataset = "digits"
licence = "MIT"

[architecture]
name = "digits_convnet"
args = {{ width = 16, note = "x", rate = 0.5, flag = true }}

[preprocess]
mean = [0.5]
std = [0.25]

[threat]
norm = "Linf"
eps = "8/255"  # the paper's radius

[recipe]
alpha = 0.95
beta = 0.5
sigma = "30/255"
iterations = 100
batch_size = 32
optimizer = "sgd"
lr = 0.1
momentum = 0.9
nesterov = true
schedule = "steps"
milestones = [0.5, 0.75]

[recipe.adversary]
eps = 0.3
step_size = "1/100"
steps = 7

[weights]
path = "digits/old.safetensors"
sha256 = "{SHA}"

[paper]
source = "arXiv:1910.11585"
table = "2"
figures = {{ natural = 93.1, pgd = 54 }}
"""

SMALL = """version = 1
title = "Test"
dataset = "digits"

[architecture]
name = "digits_convnet"
args = { width = 4, hidden = 8 }

"""
