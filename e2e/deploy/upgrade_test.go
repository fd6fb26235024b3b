package deploy_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// An upgrade from a chart that lacked a value keeps what the user had set and takes the new value's default. So does the upgrade
// to mode cleanup, as the notes say it.
func TestUpgradeKeepsValues(t *testing.T) {
	ctx := labtest.Context(t)
	const ns, release, name = "imdsgate-upgrade", "up", "up-imdsgate"
	if err := shared.Namespace(ctx, ns, nil); err != nil {
		t.Fatal(err)
	}
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	if err := n.SetPermissions(ctx, []rbacv1.PolicyRule{{APIGroups: []string{"*"}, Resources: []string{"*"}, Verbs: []string{"*"}}}); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	inNode := func(args ...string) error {
		_, err := n.Run(context.WithoutCancel(ctx), "env", append([]string{"HELM_CACHE_HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_DATA_HOME=" + home,
			helmPath(t), "--kubeconfig", n.Kubeconfig(), "-n", ns}, args...)...)
		return err
	}
	if err := inNode("install", release, olderChart(t), "--set", "image.repository=registry.example/imdsgate,image.tag=old,flags.issuer=web-identity,flags.audiences={sts.example},startupTaint="+taint, "--set-string", "nodeSelector.pool=a"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := inNode("uninstall", release); err != nil {
			t.Error(err)
		}
	})
	pod := func() corev1.PodSpec {
		t.Helper()
		ds, err := shared.Kube.AppsV1().DaemonSets(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return ds.Spec.Template.Spec
	}
	want := environment(pod().Containers[0])
	if want["IMDSGATE_AUDIENCES"] != "sts.example" || want["IMDSGATE_CNI_RESULTS"] != "" {
		t.Fatalf("the older chart's environment: %v", want)
	}
	if err := inNode("upgrade", release, chartDir, "--reuse-values"); err == nil || !strings.Contains(err.Error(), "missing property 'cni-results'") {
		t.Errorf("--reuse-values: err = %v, want a refusal that names the missing value", err)
	}
	if err := inNode("upgrade", release, chartDir, "--reset-then-reuse-values"); err != nil {
		t.Fatal(err)
	}
	want["IMDSGATE_CNI_RESULTS"] = "/var/lib/cni/results"
	if diff := cmp.Diff(want, environment(pod().Containers[0])); diff != "" {
		t.Errorf("environment (-want +after the upgrade):\n%s", diff)
	}

	if err := inNode("upgrade", release, chartDir, "--reset-then-reuse-values", "--set", "mode=cleanup"); err != nil {
		t.Fatal(err)
	}
	after := pod()
	if c := after.InitContainers; len(c) != 1 || c[0].Name != "cleanup" || c[0].Image != "registry.example/imdsgate:old" || after.NodeSelector["pool"] != "a" {
		t.Errorf("mode cleanup: init containers %+v on nodes %v", c, after.NodeSelector)
	}
	if _, err := shared.Kube.RbacV1().ClusterRoles().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("mode cleanup keeps the daemon's rights: %v", err)
	}
}

// olderChart is the chart before it had flags.cni-results.
func olderChart(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "imdsgate")
	if err := os.CopyFS(dir, os.DirFS(chartDir)); err != nil {
		t.Fatal(err)
	}
	edit := func(file string, change func(string) string) {
		t.Helper()
		path := filepath.Join(dir, file)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(change(string(text))), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	edit("values.yaml", func(s string) string {
		before, rest, _ := strings.Cut(s, "  cni-results:")
		_, after, _ := strings.Cut(rest, "\n")
		return before + after
	})
	edit("values.schema.json", func(s string) string {
		var schema map[string]any
		if err := json.Unmarshal([]byte(s), &schema); err != nil {
			t.Fatal(err)
		}
		flags := schema["properties"].(map[string]any)["flags"].(map[string]any)
		delete(flags["properties"].(map[string]any), "cni-results")
		var required []any
		for _, name := range flags["required"].([]any) {
			if name != "cni-results" {
				required = append(required, name)
			}
		}
		flags["required"] = required
		b, err := json.Marshal(schema)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	})
	edit("templates/_helpers.tpl", func(s string) string { return strings.Replace(s, ` "cni-results"`, "", 1) })
	return dir
}
