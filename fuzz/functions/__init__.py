"""The public helpers of megatron-core one by one: what each promises, how it is called, whether it keeps it."""
