"""One table of tolerances; each row says what is compared and why this much is allowed."""

FORMULA_FP32 = {"rtol": 1e-5, "atol": 1e-6}  # our fp32 formula against our fp64 formula
OTHER_PACKAGE = {"rtol": 1e-4, "atol": 1e-5}  # the same mathematics in another package
EXACT = {"rtol": 0.0, "atol": 0.0}  # refactors, batch splits, permutations, pickling of pure formulas on CPU
NETWORK_BATCH = {"rtol": 1e-4, "atol": 1e-5}  # a network on another batch size: other kernels, other summation order
HALF_NETWORK = {"rtol": 1.6e-2, "atol": 1e-2}  # bf16/fp16 against fp32: torch's own default for bf16
