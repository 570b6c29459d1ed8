"""From shards to a bank: index, plan, the engine, the Beam job, finalise."""
