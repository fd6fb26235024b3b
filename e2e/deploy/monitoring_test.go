package deploy_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

// What the chart gives to Prometheus and Grafana is what e2e/monitoring has tried.
func TestMonitoring(t *testing.T) {
	_, all := template(t, "kube-system", "--set", "metrics.prometheusRule.enabled=true", "--set", "metrics.prometheusRule.labels.release=prom",
		"--set", "metrics.dashboard.enabled=true")
	rule := *get[map[string]any](t, all, "PrometheusRule")
	b, err := os.ReadFile(chartDir + "/monitoring/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	if err := yaml.Unmarshal(b, &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, rule["spec"]); diff != "" {
		t.Errorf("the PrometheusRule is not alerts.yaml (-file +chart):\n%s", diff)
	}
	if labels := rule["metadata"].(map[string]any)["labels"].(map[string]any); labels["release"] != "prom" {
		t.Errorf("labels of the PrometheusRule: %v", labels)
	}
	board := get[corev1.ConfigMap](t, all, "ConfigMap")
	if !json.Valid([]byte(board.Data["imdsgate.json"])) || board.Labels["grafana_dashboard"] != "1" {
		t.Errorf("the dashboard is no JSON, or without the label that Grafana's side container looks for: %v", board.Labels)
	}
	for _, kind := range []string{"PrometheusRule", "ConfigMap"} {
		_, none := template(t, "kube-system")
		for _, o := range none {
			if o.GetKind() == kind {
				t.Errorf("a %s without being asked", kind)
			}
		}
	}
}
