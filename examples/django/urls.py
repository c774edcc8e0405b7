"""URLs of the ledger on Django."""

from django.urls import path

from . import views

urlpatterns = [
    path("accounts/<int:number>", views.account),
    path("transfers", views.transfers),
]
