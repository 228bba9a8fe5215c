"""From Dynamo's graph to a functional ATen graph, and what is read off Dynamo while it compiles."""
