"use strict";

// Swagger UI over this service's own description.
const { openapi } = document.currentScript.dataset;
SwaggerUIBundle({
  url: openapi,
  dom_id: "#swagger-ui",
  deepLinking: true,
  layout: "BaseLayout",
  validatorUrl: null, // asks nobody else
});
