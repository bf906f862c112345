"""Generated rehearsals of expert-parallel PPO on megatron-core, judged by laws."""
