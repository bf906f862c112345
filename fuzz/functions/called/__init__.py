"""How the functions are called inside a rank, a module per family: nothing else here knows megatron-core."""
