from conductor_app import durable_task


@durable_task
def leaf(ctx):
    return 1


@durable_task
def one(ctx):
    return ctx.invoke("a", leaf)


@durable_task
def three(ctx):
    ctx.invoke("a", leaf)
    ctx.invoke("b", leaf)
    return ctx.invoke("c", leaf)
