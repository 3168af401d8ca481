// Reads objects of the Prometheus operator as YAML from standard input and judges each by the schema of its CRD.
// Prints a line for each, and ends with 1 when one is wrong.
import { readFileSync } from 'node:fs';
import { PodMonitor } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor';
import { PrometheusRule } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule';
import { ServiceMonitor } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor';
import YAML from 'yaml';

const kinds = { PodMonitor, PrometheusRule, ServiceMonitor };
let wrong = 0;
for (const document of YAML.parseAllDocuments(readFileSync(0, 'utf8'))) {
  const object = document.toJS();
  const name = `${object.kind} ${object.metadata.name}`;
  try {
    new kinds[object.kind](object).validate();
    console.log(`${name}: valid`);
  } catch (problem) {
    wrong += 1;
    console.log(`${name}: ${problem.message}`);
  }
}
process.exit(wrong === 0 ? 0 : 1);
