package pods

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/imdsgate/imdsgate/proxy"
)

// Life of a web identity token, in seconds. It is used once, at once, so the API's minimum is the default; a service
// account may ask for more with eks.amazonaws.com/token-expiration, for STS servers that end the session with the token.
const (
	tokenSecondsMin = 600
	tokenSecondsMax = 86400
)

// Token asks the API server for a web identity token of a service account that a pod of this node uses, bound to that pod:
// it is worth nothing once the pod is gone. Where the pod went a moment ago (404, 409) another one is taken.
func (p *Pods) Token(ctx context.Context, namespace, serviceAccount, audience string) (string, error) {
	name := types.NamespacedName{Namespace: namespace, Name: serviceAccount}
	pods, seconds := p.boundTo(name)
	err := errors.New("no pod of this node uses it")
	for _, pod := range pods {
		request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			Audiences:         []string{audience},
			ExpirationSeconds: &seconds,
			BoundObjectRef: &authenticationv1.BoundObjectReference{
				APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: types.UID(pod.UID),
			},
		}}
		var answer authenticationv1.TokenRequest
		err = p.client.Post().Namespace(namespace).Resource("serviceaccounts").Name(serviceAccount).SubResource("token").
			VersionedParams(&metav1.CreateOptions{}, metav1.ParameterCodec).Body(request).Do(ctx).Into(&answer)
		if err == nil && answer.Status.Token == "" {
			err = errors.New("the answer holds no token")
		}
		if err == nil {
			return answer.Status.Token, nil
		}
		if !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			break
		}
	}
	return "", fmt.Errorf("token of service account %s: %w", name, explainForbidden(err, "create", "serviceaccounts/token"))
}

// boundTo returns the pods that use a service account, those that stay first, and the life of its tokens.
func (p *Pods) boundTo(name types.NamespacedName) ([]proxy.Pod, int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	u := p.accounts[name]
	if u == nil {
		return nil, tokenSecondsMin
	}
	users := make([]*resident, 0, len(u.by))
	for r := range u.by {
		users = append(users, r)
	}
	slices.SortFunc(users, func(a, b *resident) int {
		if a.terminating != b.terminating {
			if a.terminating {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.pod.UID, b.pod.UID)
	})
	pods := make([]proxy.Pod, 0, len(users))
	for _, r := range users {
		pods = append(pods, r.pod)
	}
	return pods, tokenSeconds(u.annotations[proxy.AnnotationTokenExpiration])
}

func tokenSeconds(annotation string) int64 {
	n, err := strconv.ParseInt(annotation, 10, 64)
	if err != nil {
		return tokenSecondsMin
	}
	return min(max(n, tokenSecondsMin), tokenSecondsMax)
}
