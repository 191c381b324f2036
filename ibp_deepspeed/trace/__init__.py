"""What the stages really did, and when: recorded by the engine, written as a Chrome trace, read, drawn, explained."""
