"""The project's Celery app without confirmations of RabbitMQ, for a worker that a test starts."""

from project.celery import app

app.conf.broker_transport_options = {
    name: value for name, value in app.conf.broker_transport_options.items() if name != "confirm_publish"
}
