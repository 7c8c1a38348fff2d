"""Merges: a file is a merge method, with one pure function of tensors that has the file's name.

Its positional parameters are the inputs (`*checkpoints` takes any number), its keyword-only ones the settings; one of
them, marked `PerBlock`, may differ from block to block. The engine calls it for one tensor at a time, in fp32 for
inputs of at most 16 bits and in fp64 otherwise, and rounds once. What it may use, so that the result is the same on
every machine: `+ − × ÷`, `abs`, comparisons and `where` in separate operations, and `sdforge.exact` for roots,
reductions, scalar functions, choices by size and random ones. Not `maximum` and its like where 0 may meet −0.
Three settings belong to the engine: `seed` is the target's (or the recipe's), `tensor` the tensor's `component.name`,
`latents` what the channels of the family's latents mean.
A method that asks for `tensor` is planned tensor by tensor: `simplify` leaves it out where it decides nothing.
Modules beside the methods whose names begin with `_` hold what several share.

Beside the function: `VERSION`, raised when results change; `ELEMENTWISE = True` where each number of the result is
made of the numbers at its place and the settings alone, which lets the engine compute it in parts, in any shape;
`KEEPS_NAN = True` where NaN or Inf in any input is NaN or Inf in the result, whatever the settings are, so that it is
looked for there alone; and `simplify(inputs, parameters)`: what remains to be computed: the one input whose bytes pass
through, or the (inputs, parameters) that decide the result. It sees identities only, so that plans need no bytes.
"""
