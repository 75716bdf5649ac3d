"""The demo's options, shortened."""

TINY = [
    "--recipe.hidden_size=16",
    "--recipe.depth=1",
    "--recipe.num_heads=2",
    "--recipe.multiplicity=2",
    "--recipe.sampler_steps=3",
    "--expected_batch_size=40",
    "--performance.microbatch_size=40",
    "--performance.threads=1",
]
