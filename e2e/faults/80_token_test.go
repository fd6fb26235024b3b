package faults

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/imdsgate/imdsgate/e2e/clustertest"
)

// The token by which the daemon speaks to the API server is replaced, and the old one refused from then on. Kubelet does the first
// after eight tenths of a token's life, here it is the test; a token ends with the Secret that it is bound to.
func TestFaultTokenRotated(t *testing.T) {
	f := shared.fault(t, "in-cluster token rotated", 4*time.Minute, both)
	token := func(secret string) string {
		t.Helper()
		made, err := f.Kube.CoreV1().Secrets(clustertest.ReleaseNamespace).Create(f.ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secret}}, metav1.CreateOptions{})
		f.must(err)
		t.Cleanup(func() {
			err := f.Kube.CoreV1().Secrets(clustertest.ReleaseNamespace).Delete(context.WithoutCancel(f.ctx), secret, metav1.DeleteOptions{})
			if err != nil && !apierrors.IsNotFound(err) { // the old one's is gone before
				t.Error(err)
			}
		})
		life := int64(600) // the shortest there is
		r, err := f.Kube.CoreV1().ServiceAccounts(clustertest.ReleaseNamespace).CreateToken(f.ctx, clustertest.Release, &authenticationv1.TokenRequest{
			Spec: authenticationv1.TokenRequestSpec{
				ExpirationSeconds: &life, BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Secret", Name: secret, UID: made.UID},
			},
		}, metav1.CreateOptions{})
		f.must(err)
		return r.Status.Token
	}
	write := func(name, content string) {
		t.Helper()
		for _, node := range both {
			dir := filepath.Join(f.Node(node).VarLib(), "token")
			f.must(os.MkdirAll(dir, 0o755))
			f.must(os.WriteFile(filepath.Join(dir, "new"), []byte(content), 0o600))
			f.must(os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, name)))
		}
	}
	// alive says what the API server thinks of a token.
	alive := func(token string) error {
		c := rest.AnonymousClientConfig(f.Config)
		c.BearerToken = token
		k, err := kubernetes.NewForConfig(c)
		f.must(err)
		_, err = k.CoreV1().Pods("").List(f.ctx, metav1.ListOptions{Limit: 1})
		return err
	}
	authority, err := f.Kube.CoreV1().ConfigMaps(clustertest.ReleaseNamespace).Get(f.ctx, "kube-root-ca.crt", metav1.GetOptions{})
	f.must(err)
	old := token("faults-old")
	write("ca.crt", authority.Data["ca.crt"])
	write("namespace", clustertest.ReleaseNamespace)
	write("token", old)
	shared.reinstall(t, "-f", f.values(
		mount{name: "token", node: "/var/lib/token", kind: "Directory", path: "/var/run/secrets/kubernetes.io/serviceaccount"}))
	t.Cleanup(func() { shared.reinstall(t) })
	f.quiet()
	f.must(alive(old))

	f.roleless()
	renewed := token("faults-new")
	write("token", renewed)
	f.must(f.Kube.CoreV1().Secrets(clustertest.ReleaseNamespace).Delete(f.ctx, "faults-old", metav1.DeleteOptions{}))
	f.must(f.Kill(f.ctx, "kube-apiserver"))
	f.struck()
	f.must(f.StartControlPlane(f.ctx))
	f.over()
	f.must(alive(renewed))
	if err := alive(old); !apierrors.IsUnauthorized(err) {
		t.Errorf("the old token is answered %v, not 401", err)
	}
	f.note("the old token is answered 401")
	f.giveRoles()
	f.newPods()
	// client-go reads the file once a minute; kubelet replaces a token when a fifth of its life is left, 12 min of the usual hour.
	f.done(expect{whole: time.Minute + reconnected})
}
