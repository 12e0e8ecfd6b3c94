from django.db import migrations, models

import conductor_app.models.fields


class Migration(migrations.Migration):

    dependencies = [
        ('conductor_app', '0013_limits'),
    ]

    operations = [
        migrations.AddField(
            model_name='execution',
            name='tree_deadline_at',
            field=models.DateTimeField(blank=True, null=True, verbose_name='deadline of the tree'),
        ),
        migrations.AddIndex(
            model_name='execution',
            index=conductor_app.models.fields.PartialIndex(fields=['finished_at', 'tree_deadline_at'], name='conductor_ex_tree_deadline', where=models.Q(('finished_at__isnull', True), ('tree_deadline_at__isnull', False))),
        ),
    ]
