// Shows the API description with Swagger UI; everything comes from this service.
window.addEventListener("DOMContentLoaded", () => {
  SwaggerUIBundle({
    url: "/docs/json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    displayRequestDuration: true,
    tryItOutEnabled: true,
    validatorUrl: null,
    defaultModelsExpandDepth: 0,
  });
});
