from django.db import migrations, models

import conductor_app.models.fields


class Migration(migrations.Migration):

    dependencies = [
        ('conductor_app', '0009_forks'),
    ]

    operations = [
        migrations.AddField(
            model_name='execution',
            name='unique_key',
            field=conductor_app.models.fields.ExactCharField(blank=True, max_length=255, null=True, verbose_name='unique key'),
        ),
        migrations.AddField(
            model_name='execution',
            name='predecessor',
            field=models.UUIDField(blank=True, null=True, verbose_name='predecessor'),
        ),
        migrations.AddField(
            model_name='execution',
            name='due_then',
            field=models.DateTimeField(blank=True, null=True, verbose_name='due then'),
        ),
        migrations.AddIndex(
            model_name='execution',
            index=conductor_app.models.fields.PartialIndex(fields=['unique_key', 'task'], name='conductor_ex_unique', unique=True, where=models.Q(('unique_key__isnull', False))),
        ),
        migrations.AddIndex(
            model_name='execution',
            index=conductor_app.models.fields.PartialIndex(fields=['predecessor'], name='conductor_ex_predecessor', where=models.Q(('predecessor__isnull', False))),
        ),
    ]
