"""The command `titan-fp8`: small tools around a training run, one module a command."""
